"""Measuring behind a real ssh server on loopback: what works, and everything that goes wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from export import DeviceError, export_onnx, lowbit, measure_interleaved
from export.devices import Settings, measure_on, probe_device
from quantizers import QuantSpec, calibrate, prepare

QUICK = Settings(warmup=1, rounds=8, memory=False)


def measure(device, paths, **more):
    return measure_on(device, paths, QUICK, **more)


def test_a_run_is_measured_scored_and_leaves_nothing(ssh_server, here, plain, packed, sample):
    said = []
    settings = Settings(warmup=1, rounds=25, affinity=(0,), providers=("cpu",))
    device = ssh_server.device(python=here, name="board")
    reports = measure_on(device, {"packed": packed, "plain": plain}, settings, sample=sample, say=said.append)
    report = reports["packed"]
    assert list(reports) == ["packed", "plain"] and report.device == "board"
    assert 0 < report.min_ms <= report.p10_ms <= report.median_ms <= report.p90_ms <= report.p99_ms
    assert report.agreement == report.accuracy == 1.0 and report.images == 20 and report.max_difference == 0
    assert report.peak_memory_bytes > report.runtime_memory_bytes > 10e6
    assert report.size_bytes == packed.stat().st_size < reports["plain"].size_bytes
    assert report.affinity == (0,) and report.interleaved_with == ("plain",)
    assert report.machine["cpu"] and report.machine["kernel"].startswith("Linux")
    assert any("25 rounds of packed; plain" in line for line in said)
    assert ssh_server.left() == []
    json.dumps(report.to_json())


def test_the_address_may_be_an_alias_of_the_users_config(ssh_server, here):
    probe = probe_device(ssh_server.device(python=here, address="ssh://board"))
    assert probe.loads[:3] == ("int2", "int4", "int8") and "CPUExecutionProvider" in probe.providers
    assert probe.memory_available_bytes > 1e6 and probe.free_disk_bytes > 1e6
    assert ssh_server.left() == []


@pytest.mark.slow
def test_the_public_function_takes_a_device(ssh_server, here, plain):
    report = measure_interleaved({"a": plain}, on=ssh_server.device(python=here), warmup=0, rounds=3, memory=False)["a"]
    assert report.device.startswith("ssh://") and report.rounds == 3


def test_connection_refused(ssh_server, plain):
    with pytest.raises(DeviceError, match=r"Connection refused.*start it, or correct the port"):
        measure(ssh_server.device(address="ssh://127.0.0.1:1"), {"a": plain})


def test_wrong_key(ssh_server, plain):
    stranger = ssh_server.device(ssh_options=("-F", str(ssh_server.folder / "client-stranger")))
    with pytest.raises(DeviceError, match=r"Permission denied.*takes none of your keys"):
        measure(stranger, {"a": plain})


def test_unknown_host_key(ssh_server, plain):
    unknown = ssh_server.device(ssh_options=("-o", "UserKnownHostsFile=/dev/null", *ssh_server.device().ssh_options))
    with pytest.raises(DeviceError, match=r"Host key verification failed.*connect once by hand"):
        measure(unknown, {"a": plain})


def test_no_such_host(ssh_server, plain):
    with pytest.raises(DeviceError, match=r"there is no such host"):
        measure(ssh_server.device(address="ssh://nowhere.invalid"), {"a": plain})


def test_no_such_python(ssh_server, plain):
    with pytest.raises(DeviceError, match=r"could not be started.*name one"):
        measure(ssh_server.device(python="/opt/none/python3"), {"a": plain})


def test_a_python_relative_to_the_home_folder_probes_and_measures(ssh_server, here, plain):
    python = "../" * 9 + here.lstrip("/")  # of any home folder
    assert measure(ssh_server.device(python=python), {"a": plain})["a"].median_ms > 0


def test_runtime_missing(ssh_server, here, plain):
    bare = ssh_server.script("bare", f'#!/bin/sh\nexec {here} -S -I "$@"\n')
    with pytest.raises(DeviceError, match=r"no working onnxruntime \(ModuleNotFoundError.*pip install onnxruntime"):
        measure(ssh_server.device(python=bare), {"a": plain})
    assert ssh_server.left() == []


def old_runtime(server, here, name, loads):
    """Return a Python whose onnxruntime is the real one under an old version, and refuses what that could not load."""
    folder = server.folder / name
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(
        "import onnxruntime as ort\n"
        "ort.__version__ = '1.15.0'\n"
        "Session = ort.InferenceSession\n"
        f"LOADS = {loads!r}\n"
        "def opset(model):\n"
        "    import onnx\n"
        "    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)\n"
        "    return proto.opset_import[0].version\n"
        "def old(model, *args, **kwargs):\n"
        "    if opset(model) not in LOADS:\n"
        "        raise RuntimeError('ONNX Runtime only *guarantees* support for models stamped with official opsets')\n"
        "    return Session(model, *args, **kwargs)\n"
        "ort.InferenceSession = old\n"
    )
    return server.script(f"{name}.sh", f'#!/bin/sh\nPYTHONPATH={folder} exec {here} "$@"\n')


@pytest.mark.slow
def test_an_old_runtime_gets_the_weights_repacked(ssh_server, here, plain, packed, sample):
    python = old_runtime(ssh_server, here, "old", [17])
    report = measure(ssh_server.device(python=python), {"packed": packed}, sample=sample)["packed"]
    assert report.repacked == ("int8",) and report.machine["onnxruntime"] == "1.15.0"
    assert report.size_bytes == plain.stat().st_size and report.agreement == 1.0 and report.max_difference == 0
    python = old_runtime(ssh_server, here, "middle", [17, 21])
    report = measure(ssh_server.device(python=python), {"packed": packed}, sample=sample)["packed"]
    assert report.repacked == ("int4", "int8") and report.max_difference == 0


def test_runtime_too_old_for_everything(ssh_server, here, packed):
    python = old_runtime(ssh_server, here, "ancient", [])
    with pytest.raises(DeviceError, match=r"onnxruntime 1\.15\.0 there loads none.*must be at least 1\.14"):
        measure(ssh_server.device(python=python), {"packed": packed})
    assert ssh_server.left() == []


@pytest.mark.slow
def test_a_runtime_that_lacks_the_provider(ssh_server, here, plain):
    with pytest.raises(ValueError, match=r"provider 'CUDAExecutionProvider' is not in this onnxruntime"):
        measure(ssh_server.device(python=here, provider="CUDAExecutionProvider"), {"a": plain})
    assert ssh_server.left() == []


@pytest.mark.slow
def test_disk_full_is_found_before_anything_is_copied(ssh_server, here, plain):
    small = ssh_server.script(
        "small", f"#!/bin/sh\nexec {here} -c \"import shutil,sys;shutil.disk_usage=lambda p:type('U',(),"
        "{'free':1000});sys.argv[0:1]=[];exec(sys.stdin.read())\" \"$@\"\n",
    )  # fmt: skip
    with pytest.raises(DeviceError, match=r"bytes must be copied, 1,000 are free there: make room, or set folder"):
        measure(ssh_server.device(python=small), {"a": plain})
    assert ssh_server.left() == []


def test_disk_full_while_copying(ssh_server, here, plain, tmp_path):
    """A quota that lets the runner in and no more: the login shell of the session has a file size limit."""
    big = tmp_path / "big.onnx"
    big.write_bytes(plain.read_bytes())
    limited = ssh_server.device(python=here)
    shell = ssh_server.script("limited", '#!/bin/sh\nulimit -f 16\nexec sh -c "$SSH_ORIGINAL_COMMAND"\n')
    key = (ssh_server.folder / "user.pub").read_text()
    (ssh_server.folder / "authorized").write_text(f'command="{shell}" {key}')
    try:
        with pytest.raises(DeviceError, match=r"cannot write to .*on the device: .*(too large|File size|signal|tar)"):
            measure(limited, {"a": big})
    finally:
        (ssh_server.folder / "authorized").write_text(key)
    assert ssh_server.left() == []


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a full file system needs root")
def test_disk_full_of_a_real_file_system(ssh_server, here, plain, sample):
    """The device's folder is a file system of 40 kB; the probe is told that there is room."""
    place = ssh_server.folder / "full"
    place.mkdir(exist_ok=True)
    inside = ["nsenter", "--mount", "--target", str(ssh_server.process.pid)]
    mount = [*inside, "mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no mount in this container")
    liar = ssh_server.script(
        "liar", f"#!/bin/sh\nexec {here} -c \"import shutil,sys;shutil.disk_usage=lambda p:type('U',(),"
        "{'free':10**9});sys.argv[0:1]=[];exec(sys.stdin.read())\" \"$@\"\n",
    )  # fmt: skip
    try:
        with pytest.raises(DeviceError, match=r"cannot write to .*No space left on device"):
            measure(ssh_server.device(python=liar, folder=str(place)), {"a": plain}, sample=sample)
        done = subprocess.run([*inside, "ls", "-A", str(place)], capture_output=True, text=True, check=True)
        assert done.stdout == ""
    finally:
        subprocess.run([*inside, "umount", str(place)], check=True)


@pytest.mark.slow
def test_hung_device(ssh_server, here, plain):
    """It answers the probe, then sleeps."""
    sleepy = ssh_server.script("sleepy", f'#!/bin/sh\n[ "$2" = run ] && exec sleep 60\nexec {here} "$@"\n')
    start = time.monotonic()
    with pytest.raises(DeviceError, match=r"no end within 4 s: the device hangs or needs more time \(timeout_s\)"):
        measure(ssh_server.device(python=sleepy, timeout_s=4.0), {"a": plain})
    assert time.monotonic() - start < 20
    assert ssh_server.left() == []


@pytest.mark.slow
def test_host_lost_in_mid_run(ssh_server, here, plain):
    """The session is killed while the rounds run; the device, still up, cleans up by itself."""
    said = threading.Event()

    def lose():
        said.wait(30)
        victims = ssh_server.sessions()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=lose)
    thread.start()
    settings = Settings(warmup=0, rounds=2_000_000, memory=False)
    with pytest.raises(DeviceError, match=r"ssh to .* failed or was cut off"):
        measure_on(
            ssh_server.device(python=here), {"a": plain}, settings,
            say=lambda line: said.set() if "rounds of" in line else None,
        )  # fmt: skip
    thread.join()
    assert ssh_server.left() == []


BENCH = """
import json, sys
from export.devices import Device, Settings, measure_on
fields = json.loads(sys.argv[1])
device = Device(**{**fields, "ssh_options": tuple(fields["ssh_options"])})
measure_on(device, {"m": sys.argv[2]}, Settings(rounds=10_000_000, memory=False), say=print)
"""


@contextlib.contextmanager
def killed_in_its_rounds(device, path, words):
    """Measure a file in another process of this machine, which is killed at the end; it has said these words."""
    command = [sys.executable, "-u", "-c", BENCH, json.dumps(asdict(device)), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        try:
            assert bench.stdout is not None
            while words not in bench.stdout.readline():
                assert bench.poll() is None
            yield
        finally:
            bench.kill()


def left_in_the_end(ssh_server):
    """Return what is left on the device once it has had time to remove it."""
    deadline = time.monotonic() + 30
    while ssh_server.left() and time.monotonic() < deadline:
        time.sleep(0.2)
    return ssh_server.left()


@pytest.mark.slow
def test_the_device_stops_when_bench_is_killed_here(ssh_server, here, plain):
    """Nobody is left to remove anything: the runner there sees its stdin close, ends, and its shell tidies up."""
    with killed_in_its_rounds(ssh_server.device(python=here), plain, "rounds of m"):
        assert ssh_server.left() != []
    assert left_in_the_end(ssh_server) == []


HOSTILE = {
    "endless": "yes '\x1b[31mred'",
    "endless on stderr": "yes '\x1b]0;title\x07' >&2",
    "binary": "head -c 300000 /dev/urandom; exit 3",
    "escape sequences": "printf '\\033[2J\\033]0;owned\\007\\033[31mred \\302\\233 alert' >&2; exit 3",
    "silence": "exit 0",
    "no JSON": 'printf \'<<<qkd %s\\n{{{\\nqkd %s>>>\\n\' "$3" "$3"',
    "deep JSON": "printf '<<<qkd %s\\n%s\\nqkd %s>>>\\n' \"$3\" \"$(head -c 100000 /dev/zero | tr '\\0' '[')\" \"$3\"",
    "a list": 'printf \'<<<qkd %s\\n[1]\\nqkd %s>>>\\n\' "$3" "$3"',
    "other keys": 'printf \'<<<qkd %s\\n{"machine": 3}\\nqkd %s>>>\\n\' "$3" "$3"',
}


KINDS = [
    kind if kind in ("escape sequences", "endless") else pytest.param(kind, marks=pytest.mark.slow) for kind in HOSTILE
]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_output_never_reaches_the_terminal(ssh_server, plain, kind):
    said = []
    evil = ssh_server.script("evil", f"#!/bin/sh\n{HOSTILE[kind]}\n")
    with pytest.raises(DeviceError) as caught:
        measure(ssh_server.device(python=evil), {"a": plain}, say=said.append)
    words = str(caught.value)
    assert words.isprintable() and len(words) < 1500
    assert all(line.isprintable() for line in said)
    expected = {
        "endless": "more than 8,388,608 bytes to stdout", "endless on stderr": "more than 8,388,608 bytes to stderr",
        "binary": "exit code 3", "escape sequences": "red", "silence": "it said nothing",
        "no JSON": "not JSON", "deep JSON": "not JSON", "a list": "no group of keys", "other keys": "not the runner's",
    }  # fmt: skip
    assert expected[kind] in words
    assert "owned" not in words and ssh_server.left() == []


@pytest.mark.slow
def test_figures_that_cannot_be_are_refused(ssh_server, here, plain):
    liar = ssh_server.script(
        "liar",
        f"#!{here}\nimport re, subprocess, sys\n"
        f"done = subprocess.run([{here!r}, *sys.argv[1:]], stdout=subprocess.PIPE, text=True)\n"
        "print(re.sub('\"median_ms\": [0-9.e-]+', '\"median_ms\": -1', done.stdout))\n",
    )
    with pytest.raises(DeviceError, match="a.median_ms is '-1'"):
        measure(ssh_server.device(python=liar), {"a": plain})
    assert ssh_server.left() == []


@pytest.fixture(scope="module")
def low_bit_student(eager, tmp_path_factory):
    """A student that the low-bit provider takes something of."""
    if not (found := lowbit.availability()).is_offered:
        pytest.skip(found.reason)
    torch.manual_seed(0)
    images = torch.randn(8, 3, 8, 8)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)]
    student = prepare(nn.Sequential(*layers).eval(), QuantSpec(weight_bits=2, act_bits=2), images)
    calibrate(student, images)
    return export_onnx(student.eval(), images, tmp_path_factory.mktemp("student") / "student.onnx").path


def test_the_low_bit_library_goes_to_the_device_and_leaves_it_again(ssh_server, here, low_bit_student):
    said = []
    settings = Settings(warmup=0, rounds=3, providers=("auto",))
    reports = measure_on(ssh_server.device(python=here), {"s": low_bit_student}, settings, say=said.append)
    assert list(reports) == ["s", "s, low-bit provider"]
    assert reports["s, low-bit provider"].claimed_nodes > 5 and reports["s, low-bit provider"].peak_memory_bytes > 1e6
    assert any("rounds of s; s, low-bit provider" in line for line in said) and ssh_server.left() == []


def test_a_device_whose_runtime_takes_no_plugins_measures_without(ssh_server, here, low_bit_student):
    said, settings = [], Settings(warmup=0, rounds=3, memory=False)
    device = ssh_server.device(python=old_runtime(ssh_server, here, "old", [17]))
    assert list(measure_on(device, {"s": low_bit_student}, settings, say=said.append)) == ["s"]
    assert any("needs onnxruntime 1.23 or newer, this is 1.15.0" in line for line in said)
    with pytest.raises(ValueError, match=r"s: the low-bit provider is not offered here: needs onnxruntime 1\.23"):
        measure_on(device, {"s": low_bit_student}, replace(settings, providers=("lowbit",)))
    assert ssh_server.left() == []


@pytest.mark.slow
def test_the_low_bit_library_leaves_the_device_when_bench_is_killed_here(ssh_server, here, low_bit_student):
    device = ssh_server.device(python=here)
    with killed_in_its_rounds(device, low_bit_student, "rounds of m; m, low-bit provider"):
        (folder,) = ssh_server.left()
        assert (ssh_server.folder / "work" / folder / "liblowbit.so").is_file()
    assert left_in_the_end(ssh_server) == []
