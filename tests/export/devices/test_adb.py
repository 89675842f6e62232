"""Measuring behind adb: a stand-in that speaks its formats, with Python or ``onnxruntime_perf_test`` behind it."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from export import DeviceError, measure_interleaved
from export.devices import Device, Settings, measure_on, probe_device
from export.devices.connections.adb import read_devices
from export.devices.perf_test import combine, read_output

QUICK = Settings(warmup=1, rounds=8, memory=False)
SERIAL = "R58M123ABCD"

# adb as a person sees it: the daemon's greeting, states, words of push, exit codes of `shell` (none before Android 7)
ADB = """#!{python}
import os, shutil, subprocess, sys
folder = os.path.dirname(os.path.abspath(__file__))
def setting(name, default=""):
    path = os.path.join(folder, name)
    return open(path).read().strip() if os.path.exists(path) else default
words = sys.argv[1:]
if words == ["devices"]:
    sys.stderr.write("* daemon not running; starting now at tcp:5037\\n* daemon started successfully\\n")
    print("List of devices attached")
    for line in setting("devices", "{serial}\\tdevice").splitlines():
        print(line)
    print()
    sys.exit(0)
if words[:1] != ["-s"] or words[1] not in setting("devices", "{serial}"):
    sys.stderr.write("adb: device '%s' not found\\n" % (words[1] if len(words) > 1 else ""))
    sys.exit(1)
words = words[2:]
with open(os.path.join(folder, "log"), "a") as log:
    log.write(words[0] + " " + words[-1][:900].replace("\\n", " ") + "\\n")
if words[0] == "push":
    source, target = words[1:]
    name = os.path.basename(target)
    if setting("full") and name.endswith(setting("full")):
        sys.stderr.write("adb: error: failed to copy '%s' to '%s': remote write failed: No space left on device\\n"
                         % (source, target))
        sys.exit(1)
    shutil.copy(source, target)
    size = os.path.getsize(source)
    print("%s: 1 file pushed, 0 skipped. 20.1 MB/s (%d bytes in 0.001s)" % (source, size))
    sys.exit(0)
if words[0] == "shell":
    if setting("gone") and setting("gone") in words[1]:
        sys.stderr.write("adb: device offline\\n")
        sys.exit(1)
    old = setting("old")
    done = subprocess.run(["sh", "-c", words[1]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT if old else None)
    sys.stdout.buffer.write(done.stdout.replace(b"\\n", b"\\r\\n") if old else done.stdout)
    sys.exit(0 if old else done.returncode)
sys.exit("adb: unknown command " + words[0])
"""

# onnxruntime_perf_test: really runs the model, and prints what the tool prints
PERF_TEST = """#!{python}
import sys, time
words, options = sys.argv[1:], {{}}
model = words.pop()
while words:
    word = words.pop(0)
    options[word] = words.pop(0) if word in ("-m", "-r", "-x", "-e", "-o") else True
assert options["-I"] is True and options["-m"] == "times" and options["-o"] == "99" and options["-s"] is True
mark = b"B\\x04\\n\\x00\\x10"  # the field opset_import with the default domain; its version follows
if open(model, "rb").read().rpartition(mark)[2][0] not in {opsets}:
    sys.exit("2026-01-01 10:00:00 [E:onnxruntime:] Load model from %s failed: unsupported opset" % model)
import numpy as np
import onnxruntime as ort
start = time.perf_counter()
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
print("Setting intra_op_num_threads to " + options["-x"])
print("Session creation time cost: %g s" % (time.perf_counter() - start))
entry = session.get_inputs()[0]
feeds = {{entry.name: np.zeros([size if isinstance(size, int) else 1 for size in entry.shape], np.float32)}}
times = []
for _ in range(int(options["-r"]) + 1):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
first, times = times[0], sorted(times[1:])
at = lambda share: times[min(len(times) - 1, int(share * len(times)))]
print("First inference time cost: %d ms" % (1000 * first))
print("Total inference time cost: %g s" % sum(times))
print("Total inference requests: %d" % len(times))
print("Average inference time cost: %g ms" % (1000 * sum(times) / len(times)))
print("Total inference run time: %g s" % sum(times))
print("Number of inferences per second: %g " % (len(times) / sum(times)))
print("Avg CPU usage: 98 %")
print("Peak working set size: 51232768 bytes")
print("Avg CPU usage:98")
print("Peak working set size:51232768")
print("Runs:%d" % len(times))
print("Min Latency: %g s" % times[0])
print("Max Latency: %g s" % times[-1])
for name, share in (("P50", .5), ("P90", .9), ("P95", .95), ("P99", .99), ("P999", .999)):
    print("%s Latency: %g s" % (name, at(share)))
"""


class Phone:
    """The stand-in's folder, and the device's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work = folder / "data"
        self.work.mkdir()
        self.script("adb", ADB.format(python=sys.executable, serial=SERIAL))

    def script(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def set(self, name: str, value: str) -> None:
        (self.folder / name).write_text(value)

    def device(self, **changes: object) -> Device:
        values = {"address": f"adb://{SERIAL}", "folder": str(self.work), "python": sys.executable, "timeout_s": 60.0}
        return Device(**{**values, **changes})  # type: ignore[arg-type]

    def perf_test(self, opsets=(17, 21, 25)) -> Device:
        tool = self.script("onnxruntime_perf_test", PERF_TEST.format(python=sys.executable, opsets=tuple(opsets)))
        return self.device(perf_test=tool, python="python3")

    def left(self) -> list[str]:
        return sorted(path.name for path in self.work.iterdir())

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def phone(tmp_path, monkeypatch):
    (tmp_path / "phone").mkdir()
    phone = Phone(tmp_path / "phone")
    monkeypatch.setenv("PATH", f"{phone.folder}:{os.environ['PATH']}")
    return phone


@pytest.mark.parametrize("old", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_python_on_the_device(phone, packed, plain, sample, old):
    """Old: no exit codes, CR LF, messages mixed into the output, as before Android 7."""
    phone.set("old", "yes" if old else "")
    settings = Settings(warmup=0, rounds=4)
    reports = measure_on(phone.device(name="phone"), {"packed": packed, "plain": plain}, settings, sample=sample)
    assert reports["packed"].agreement == 1.0 and reports["packed"].device == "phone"
    assert reports["plain"].peak_memory_bytes > 10e6
    assert phone.left() == []


@pytest.mark.slow
def test_the_public_function_takes_an_adb_address(phone, plain, monkeypatch):
    monkeypatch.setattr("export.devices.connections.address.FOLDERS", {"adb": str(phone.work)})
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    phone.script("python3", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    monkeypatch.setenv("PATH", f"{phone.folder}:{os.environ['PATH']}")
    report = measure_interleaved({"a": plain}, on=f"adb://{SERIAL}", warmup=0, rounds=2, memory=False)["a"]
    assert report.device == f"adb://{SERIAL}" and phone.left() == []


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("", f"adb knows no device {SERIAL}; it has none: plug it in"),
        ("emulator-5554\tdevice", f"adb knows no device {SERIAL}; it has emulator-5554"),
        (f"{SERIAL}\tunauthorized", f"{SERIAL} is unauthorized: unlock it and allow debugging"),
        (f"{SERIAL}\toffline", f"{SERIAL} is offline: plug it in again"),
        (f"{SERIAL}\tno permissions (user in plugdev group); see [http://developer.android.com]", "add the udev rules"),
        (f"{SERIAL}\trecovery", "boot the device normally"),
        (f"{SERIAL}\trescue", "is rescue: see `adb devices`"),
    ],
)
def test_a_device_that_is_not_ready(phone, plain, devices, message):
    phone.set("devices", devices)
    with pytest.raises(DeviceError) as caught:
        measure_on(phone.device(), {"a": plain}, QUICK)
    assert message in str(caught.value)


def test_daemon_messages_are_no_devices():
    text = "* daemon not running; starting now at tcp:5037\nList of devices attached\na\tdevice\nb\toffline\n"
    assert read_devices(text) == {"a": "device", "b": "offline"}
    assert read_devices("adb: cannot connect") == {}
    assert read_devices("List of devices attached\n\x1b[31mred\tdevice\n") == {"red": "device"}


def test_no_adb(plain, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="cannot run adb: No such file or directory; install it"):
        measure_on(Device(f"adb://{SERIAL}"), {"a": plain}, QUICK)


@pytest.mark.parametrize("kind", ["python", "perf_test"])
def test_disk_full(phone, plain, kind):
    phone.set("full", "0.onnx")
    device = phone.device() if kind == "python" else phone.perf_test()
    with pytest.raises(DeviceError, match=r"cannot copy 0\.onnx to .* on the device: .*No space left on device"):
        measure_on(device, {"a": plain}, QUICK)
    assert phone.left() == []


def test_a_device_that_goes_away_in_mid_run(phone, plain):
    phone.set("gone", "runner.py run")
    with pytest.raises(DeviceError, match=rf"adb lost {SERIAL} \(exit code 1: adb: device offline\)"):
        measure_on(phone.device(), {"a": plain}, QUICK)
    assert phone.left() == []


def test_no_python_on_the_device(phone, plain):
    with pytest.raises(DeviceError, match=r"could not be started .*name one that has onnxruntime"):
        measure_on(phone.device(python="/system/bin/python3"), {"a": plain}, QUICK)


def test_a_folder_that_cannot_be_made(phone, plain):
    device = phone.device(folder="/proc/none")
    with pytest.raises(DeviceError, match=r"cannot make /proc/none/qkd-.* on the device"):
        measure_on(device, {"a": plain}, QUICK)


def test_perf_test_measures_in_turns(phone, packed, plain):
    said = []
    device = Device(**{**vars(phone.perf_test()), "affinity": (0,)})
    reports = measure_on(device, {"packed": packed, "plain": plain}, QUICK, say=said.append)
    report = reports["packed"]
    assert 0 < report.min_ms <= report.median_ms <= report.p90_ms <= report.p99_ms < 1000
    assert report.p10_ms is None and report.accuracy is None and report.first_run_ms is not None
    assert report.peak_memory_bytes == 51_232_768 and report.machine["cpu"] and report.load[0] is not None
    assert report.notes[0].startswith("by onnxruntime_perf_test")
    assert (report.warmup, report.rounds) == (4, 8) and report.input_shape[0] == 1, "as run, in four blocks"
    calls = [line for line in phone.log().splitlines() if "-r 2 " in line]
    assert [line.split(".onnx")[0][-1] for line in calls] == list("01100110")
    assert all("taskset 1 " in line and "-x 1 -e cpu" in line for line in calls)
    assert len(said) == 8 and phone.left() == []


def test_a_greeting_is_no_figure_of_perf_test(phone, plain):
    """What a shell prints at every login came first, and was read as the architecture, and as the first P50."""
    adb = (phone.folder / "adb").read_text()
    greeting = "sys.stdout.write('Last login: 12 days ago\\nP50 Latency: 0.000001 s\\n==\\n'); sys.stdout.flush()"
    phone.script("adb", adb.replace('    old = setting("old")', f'    {greeting}\n    old = setting("old")'))
    report = measure_on(phone.perf_test(), {"a": plain}, QUICK)["a"]
    assert report.machine["architecture"] == os.uname().machine and report.machine["kernel"].startswith("Linux")
    assert report.min_ms <= report.median_ms and report.median_ms != pytest.approx(0.001)


def test_perf_test_is_not_pinned_to_cpus_that_are_not_there(phone, plain):
    device = phone.perf_test()
    with pytest.raises(ValueError, match=r"affinity \[0, 998\]: CPUs \[998\] are not there; the device's CPUs: \[0"):
        measure_on(Device(**{**vars(device), "affinity": (0, 998)}), {"a": plain}, QUICK)
    two = measure_on(Device(**{**vars(device), "affinity": (0, 0)}), {"a": plain}, replace(QUICK, threads=2))["a"]
    assert "2 threads on 1 core" in two.notes and "taskset 1 " in phone.log() and phone.left() == []


def test_perf_test_takes_no_fixed_batch_for_one_image(phone, plain, tmp_path):
    model = onnx.load(plain)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, tmp_path / "four.onnx")
    with pytest.raises(ValueError, match="four: its batch is fixed at 4, but onnxruntime_perf_test is to measure one"):
        measure_on(phone.perf_test(), {"four": tmp_path / "four.onnx"}, QUICK)
    assert phone.left() == []


def test_perf_test_is_bounded_on_the_device_too(phone, plain):
    """Whoever started it may be killed: the device itself must end it then."""
    said, device = [], Device(**{**vars(phone.perf_test()), "timeout_s": 9.5})
    phone.script("timeout", f'#!/bin/sh\necho "$@" >>{phone.folder}/bounds\nshift\nexec "$@"\n')
    measure_on(device, {"a": plain}, QUICK, say=said.append)
    bounds = [line for line in (phone.folder / "bounds").read_text().splitlines() if "-r 2 " in line]
    assert len(bounds) == 4 and all(line.startswith("15 ") and "onnxruntime_perf_test -I" in line for line in bounds)
    phone.script("timeout", "#!/bin/sh\nexit 1\n")  # an old BusyBox's has other arguments: then without
    measure_on(device, {"a": plain}, QUICK)
    assert phone.left() == []


@pytest.mark.slow
def test_perf_test_gets_the_weights_repacked(phone, packed, plain):
    report = measure_on(phone.perf_test(opsets=(17,)), {"packed": packed}, QUICK)["packed"]
    assert report.repacked == ("int8",) and report.size_bytes == plain.stat().st_size
    with pytest.raises(DeviceError, match="loads none of the probe models"):
        measure_on(phone.perf_test(opsets=()), {"packed": packed}, QUICK)
    assert phone.left() == []


def test_perf_test_that_cannot_be_run(phone, plain):
    missing = phone.device(perf_test="/data/local/tmp/none/onnxruntime_perf_test")
    with pytest.raises(DeviceError, match=r"/none/onnxruntime_perf_test cannot be run there: .*not found"):
        measure_on(missing, {"a": plain}, QUICK)
    tool = phone.script("crash", "#!/bin/sh\ncase $* in *0.onnx) echo boom >&2; exit 139;; esac\n")
    with pytest.raises(DeviceError, match=r"onnxruntime_perf_test failed on a \(exit code 139\): boom"):
        measure_on(phone.device(perf_test=tool), {"a": plain}, QUICK)
    silent = phone.script("silent", "#!/bin/sh\nprintf '\\033[2Jhello\\007'\n")
    with pytest.raises(DeviceError, match=r"printed no median_ms \(hello\)"):
        measure_on(phone.device(perf_test=silent), {"a": plain}, QUICK)
    assert phone.left() == []


def test_what_perf_test_cannot_do(phone, plain):
    with pytest.raises(ValueError, match="takes free axes as 1, but batch_size is 2"):
        measure_on(phone.perf_test(), {"a": plain}, Settings(batch_size=2))
    with pytest.raises(ValueError, match="provider 'FooProvider' is not one of CPUExecutionProvider, Xnnpack"):
        measure_on(phone.perf_test(), {"a": plain}, Settings(providers=("FooProvider",)))


def test_a_probe_of_perf_test(phone):
    probe = probe_device(phone.perf_test(opsets=(17, 21)))
    assert probe.loads == ("int4", "int8") and probe.machine["architecture"] == os.uname().machine
    assert probe.machine["kernel"].startswith("Linux") and probe.machine["memory_bytes"] > 1e6


NEW = """Session creation time cost: 0.0238 s
First inference time cost: 5 ms
Average inference time cost: 6.1 ms
Peak working set size: 51232768 bytes
Min Latency: 5.87e-03 s
P50 Latency: 0.006 s
P90 Latency: 0.007 s
P99 Latency: 0.008 s
"""


def test_output_of_new_and_old_versions():
    found = read_output(NEW)
    assert found == pytest.approx({
        "median_ms": 6.0, "p90_ms": 7.0, "p99_ms": 8.0, "min_ms": 5.87, "load_ms": 23.8, "first_run_ms": 5.0,
        "peak_memory_bytes": 51232768,
    })  # fmt: skip
    old = NEW.replace(" Latency:", " Latency is").replace(" s\n", "sec\n").replace("First inference", "Other")
    assert read_output(old)["median_ms"] == pytest.approx(6.0) and read_output(old)["first_run_ms"] is None


@pytest.mark.parametrize("text", ["", "P50 Latency: nan s", NEW.replace("0.006", "1.2.3"), NEW.replace("P90", "P91")])
def test_output_that_lacks_a_figure(text):
    with pytest.raises(DeviceError, match="onnxruntime_perf_test printed no (median|p90)_ms"):
        read_output(text)


def test_blocks_are_combined():
    block = {"median_ms": 2.0, "p90_ms": 3.0, "p99_ms": 4.0, "min_ms": 1.0, "load_ms": 9.0, "first_run_ms": 7.0,
             "peak_memory_bytes": None}  # fmt: skip
    other = {name: None if value is None else value + 2 for name, value in block.items()}
    assert combine([block, other]) == {
        "median_ms": 3.0, "p90_ms": 4.0, "p99_ms": 6.0, "min_ms": 1.0, "load_ms": 10.0, "first_run_ms": 7.0,
        "peak_memory_bytes": None, "p10_ms": None,
    }  # fmt: skip
