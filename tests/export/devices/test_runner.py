"""The runner: old syntax, one file, turns, machines and notes; the same file runs here and on devices."""

from __future__ import annotations

import ast
import builtins
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from export import Sample
from export.devices import Settings, as_device, measure_on
from export.devices.onboard import runner
from export.devices.probing import probe_models
from export.sample import sample_bytes

FILE = Path(runner.__file__)
MS = 1_000_000
YOUNGER = {"removeprefix", "removesuffix", "bit_count", "is_relative_to", "with_stem", "batched", "pairwise", "cache"}


def test_it_is_one_file_of_old_python_and_needs_numpy_and_onnxruntime_alone():
    tree = ast.parse(FILE.read_text(), feature_version=(3, 8))
    found = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    found |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_nothing_younger_than_python_3_8_is_used():
    """What parses may still be too young: methods, ``strict=``, ``|`` of dictionaries and run-time annotations."""
    tree = ast.parse(FILE.read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    keywords = {word.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords}
    assert not names & YOUNGER and "strict" not in keywords
    assert "annotations" in {
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    unions = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)]
    inside = {id(part) for node in ast.walk(tree) for part in annotations(node)}
    assert [ast.unparse(node) for node in unions if id(node) not in inside] == []


def annotations(node):
    for field in ("annotation", "returns"):
        if getattr(node, field, None) is not None:
            yield from ast.walk(getattr(node, field))


class Fake:
    def __init__(self, name, order):
        self.name, self.order = name, order

    def run(self):
        self.order.append(self.name)
        return len(self.order)


def test_models_take_turns_and_the_order_rotates():
    order = []
    times = runner.take_turns([Fake("a", order), Fake("b", order), Fake("c", order)], 4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert times == [[1, 6, 8, 10], [2, 4, 9, 11], [3, 5, 7, 12]]


def test_percentiles():
    found = runner.statistics([number * MS for number in range(1, 102)])
    assert found == {"median_ms": 51.0, "p10_ms": 11.0, "p90_ms": 91.0, "p99_ms": 100.0, "min_ms": 1.0}


def test_notes_on_rounds():
    quiet = [MS] * 40
    assert runner.timing_notes(quiet) == []
    assert runner.timing_notes([MS] * 30 + [2 * MS] * 10) == [
        "noisy: p90 is 2.00 x the median",
        "slowing: the last quarter of the rounds took 2.00 x the first",
    ]
    assert runner.timing_notes([2 * MS] * 10 + [MS] * 30) == ["noisy: p90 is 2.00 x the median"]
    assert runner.timing_notes([MS] * 3 + [2 * MS]) == ["noisy: p90 is 1.70 x the median"], "too few to say: slowing"


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ({}, {}, None),
        ({"frequency_mhz": 1500.0}, {"frequency_mhz": 1400.0}, None),
        ({"frequency_mhz": 1500.0}, {"frequency_mhz": 600.0}, "throttled: from 1500 to 600 MHz"),
        ({"frequency_mhz": 600.0}, {"frequency_mhz": 1500.0}, None),
        ({"temperature_c": 50.0}, {"temperature_c": 59.0}, None),
        ({"temperature_c": 50.0}, {"temperature_c": 61.0}, "hot: 61 degrees Celsius, 11 more than before"),
        ({"temperature_c": 81.0}, {"temperature_c": 82.0}, "hot: 82 degrees Celsius, 1 more than before"),
        ({"temperature_c": None}, {"temperature_c": 50.0}, None),
        ({"load": 1.0}, {}, None),
        ({"load": 2.5}, {"load": 0.0}, "busy: load average 2.5 on 4 cores at the start"),
    ],
)
def test_notes_on_conditions(before, after, note):
    nothing = {"frequency_mhz": None, "temperature_c": None, "load": None}
    found = runner.condition_notes({**nothing, **before}, {**nothing, **after}, 4, 4, 4)
    assert found == ([] if note is None else [note])
    assert runner.condition_notes(nothing, nothing, 5, 4, 4) == ["5 threads on 4 cores"]
    assert runner.condition_notes(nothing, nothing, 2, 4, 1) == ["2 threads on 1 core"], "pinned"
    assert runner.condition_notes(nothing, nothing, 2, 4, 2) == []


def test_cpus_that_the_system_leaves_out_are_refused(monkeypatch):
    """Linux pins to those that are there and says nothing."""
    pinned = {0, 1, 2, 3}

    def pin(_, cpus):
        pinned.intersection_update(cpus)

    monkeypatch.setattr(runner.os, "sched_setaffinity", pin)
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda _: set(pinned))
    runner.pin([2, 1, 1])
    with pytest.raises(runner.Refused, match=r"affinity \[1, 6, 7\]: CPUs \[6, 7\] are not there; .* CPUs \[1, 2\]"):
        runner.pin([1, 6, 7])


@pytest.fixture
def system(monkeypatch, tmp_path):
    """Its own /proc and /sys."""
    monkeypatch.setattr(runner, "CPU_INFO", str(tmp_path / "cpuinfo"))
    monkeypatch.setattr(runner, "CPUFREQ", str(tmp_path / "cpu%s"))
    monkeypatch.setattr(runner, "THERMAL", str(tmp_path / "zone*"))
    return tmp_path


def put(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


def test_machine_without_proc(system):
    machine = runner.machine()
    assert machine["cpu"] and machine["cpu_flags"] == [] and machine["governor"] is None
    assert runner.conditions([])["frequency_mhz"] is None and runner.conditions([])["temperature_c"] is None


def test_machine_on_arm(system):
    put(system / "cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp crc32\nCPU implementer\t: 0x41\n"
        "CPU part\t: 0xd0b\n\nHardware\t: Board 5\n")  # fmt: skip
    put(system / "cpu0" / "scaling_cur_freq", "600000\n")
    put(system / "cpu1" / "scaling_cur_freq", "1500000\n")
    put(system / "cpu0" / "scaling_governor", "ondemand\n")
    for number, value in enumerate(("47312", "-273000", "0", "soon", "51000")):
        put(system / f"zone{number}" / "temp", value)
    machine = runner.machine()
    assert machine["cpu_flags"] == ["asimd", "asimddp"] and machine["governor"] == "ondemand"
    assert machine["cpu"].startswith("Cortex-A76")
    assert runner.frequency_mhz([]) == 1500.0 and runner.frequency_mhz([0]) == 600.0
    assert runner.temperature_c() == 51.0


def test_frequency_of_x86(system):
    put(system / "cpuinfo", "model name\t: Some CPU\nflags\t: avx2 fpu\ncpu MHz\t: 2000.5\n\ncpu MHz\t: 3000.5\n")
    assert runner.frequency_mhz([]) == 3000.5 and runner.machine()["cpu"].startswith("Some CPU")


def test_probe_tells_what_loads(tmp_path):
    broken = {**probe_models(), "broken": "AAAA"}
    found = runner.probe(broken, str(tmp_path))
    assert found["loads"] == {"int2": True, "int4": True, "int8": True, "broken": False}
    assert found["runtime_error"] is None and found["free_disk_bytes"] > 0
    assert runner.probe({}, str(tmp_path / "none"))["free_disk_bytes"] is None


def test_probe_without_the_runtime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = runner.probe(probe_models())
    assert found["loads"] == {} and found["runtime_error"].startswith("ModuleNotFoundError")
    assert found["machine"]["onnxruntime"] is None


def test_probe_with_a_runtime_that_breaks_on_import(monkeypatch):
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == "onnxruntime":
            raise OSError("libfoo.so.1: cannot open shared object file")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert "libfoo" in runner.probe({})["runtime_error"]


def test_the_answer_stands_between_marks_that_hold_the_token(capsys):
    runner.answer("abc", {"x": 1})
    assert capsys.readouterr().out == '\n<<<qkd abc\n{"x": 1}\nqkd abc>>>\n'


def test_a_failure_of_any_kind_is_an_answer(tmp_path, capsys, monkeypatch):
    job = {"token": "t", "timeout_s": 100, "affinity": []}
    (tmp_path / "job.json").write_text(json.dumps(job))
    monkeypatch.setattr(runner.signal, "alarm", lambda seconds: None)
    assert runner.main(["run", str(tmp_path / "job.json")]) == 0
    assert '{"failed": "KeyError: ' in capsys.readouterr().out


def test_modules_beside_the_runner_do_not_hide_others(tmp_path):
    (tmp_path / "numpy.py").write_text("raise SystemExit('hidden')")
    (tmp_path / "runner.py").write_bytes(FILE.read_bytes())
    for command, cwd in (([str(tmp_path / "runner.py")], None), (["-"], tmp_path)):
        done = subprocess.run(
            [sys.executable, *command, "probe", "t", ".", "{}"], input=FILE.read_text(), cwd=cwd,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        value = json.loads(done.stdout.split("<<<qkd t")[1].split("qkd t>>>")[0])
        assert value["machine"]["numpy"] == np.__version__


class Model:
    """A loaded model whose batch may be fixed; its logits are the image's two values."""

    name, outputs, input = "m", ["logits"], "x"

    def __init__(self, batch):
        self.shape, self.batches = (1, 2), []
        self.session = self
        self.batch = batch

    def get_inputs(self):
        return [type("Input", (), {"shape": [self.batch, 2]})]

    def run(self, outputs, feeds):
        self.batches.append(len(feeds["x"]))
        return [feeds["x"]]


@pytest.mark.parametrize(("batch", "batches"), [("batch", [16, 16, 8]), (1, [1] * 40), (7, [7] * 6)])
def test_a_sample_is_run_in_the_models_batches(tmp_path, batch, batches):
    images = np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32)
    sample = Sample(images, images.argmax(1), {"m": images + np.float32(0.5)})
    (tmp_path / "s.npz").write_bytes(sample_bytes(sample))
    model = Model(batch)
    found = runner.score(model, {"sample": "s.npz"}, str(tmp_path))
    assert model.batches == batches
    assert found == {"images": 40, "accuracy": 1.0, "agreement": 1.0, "max_difference": pytest.approx(0.5)}
    assert runner.score(model, {"sample": None}, str(tmp_path)) == {}


def test_a_sample_with_pickled_objects_is_refused(tmp_path):
    np.savez(tmp_path / "s.npz", images=np.array([{}], object))
    with pytest.raises(ValueError, match="pickle"):
        runner.score(Model(1), {"sample": "s.npz"}, str(tmp_path))


def test_one_entry_of_the_low_bit_provider_that_fails_stops_no_other(monkeypatch):
    def compare(ort, job, entry, folder):
        if entry["name"] == "bad":
            raise RuntimeError("no kernel")
        return 7

    monkeypatch.setattr(runner, "register_low_bit", lambda *_: "")
    monkeypatch.setattr(runner, "compare_low_bit", compare)
    entries = [
        {"name": name, "title": name, "key": str(key), "provider": runner.LOW_BIT, "optional": True,
         "where_nothing": "leave out"}
        for key, name in enumerate(("good", "bad"))
    ]  # fmt: skip
    failed: dict[str, str] = {}
    kept, left_out = runner.choose(None, {"models": entries}, "", failed)
    assert [one["name"] for one in kept] == ["good"] and left_out == {}
    assert failed == {"1": "RuntimeError: no kernel"}


def test_loading_the_first_model_does_not_start_the_runtime(monkeypatch, plain):
    """The first session of a process takes longer whatever it loads; another one comes before any model's."""
    opened = []

    class Ort:
        SessionOptions = onnxruntime.SessionOptions

        @staticmethod
        def InferenceSession(model, *given, **more):  # noqa: N802
            opened.append(model)

    monkeypatch.setattr(runner, "Timed", lambda ort, job, entry, folder: opened.append(entry["file"]) or entry)
    runner.open_all(Ort, {}, [{"file": "a.onnx", "provider": runner.CPU}], "", {})
    assert len(opened) == 2 and opened[1] == "a.onnx"
    assert onnxruntime.InferenceSession(opened[0]).get_inputs()[0].shape == [1]


def test_memory_that_cannot_be_taken_is_a_note(monkeypatch, tmp_path):
    job = {"models": [{"name": "m", "title": "m"}], "timeout_s": 10}
    monkeypatch.setattr(runner.sys, "executable", "/bin/false")
    assert runner.peak_memory(job, str(tmp_path), 0)["notes"][0].startswith("peak memory is not known: ")
    monkeypatch.setattr(runner.sys, "executable", str(tmp_path / "none"))
    assert "No such file" in runner.peak_memory(job, str(tmp_path), 0)["notes"][0]


ENDLESS = {"threads": 1, "batch_size": 1, "warmup": 0, "rounds": 10_000_000,
           "affinity": [], "seed": 0, "spinning": False, "memory": False, "sample": None, "timeout_s": 300,
           "token": "t", "watched": True}  # fmt: skip


def test_the_runner_ends_with_who_started_it(plain, tmp_path):
    entry = {"name": "two  spaces", "title": "m", "key": "0", "file": str(plain), "provider": "CPUExecutionProvider"}
    job = {**ENDLESS, "models": [entry]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, str(FILE), "run", str(tmp_path / "job.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and process.stdin is not None
        while b"rounds of" not in process.stderr.readline():
            assert process.poll() is None
        process.stdin.close()  # what the system does when the caller is killed
        assert process.wait(20) == runner.CALLER_GONE


def test_a_model_whose_name_has_two_spaces_is_measured(plain, sample):
    settings = Settings(warmup=0, rounds=2, memory=False, providers=("cpu",))
    reports = measure_on(as_device("local"), {"two  spaces": plain, "two spaces": plain}, settings)
    assert list(reports) == ["two  spaces", "two spaces"] and all(one.median_ms > 0 for one in reports.values())


BENCH = """
import sys
from export.devices import Settings, as_device, measure_on
measure_on(as_device("local"), {"m": sys.argv[1]}, Settings(rounds=10_000_000, memory=False), say=print)
"""


@pytest.mark.slow
def test_nothing_goes_on_when_bench_is_killed(plain):
    with subprocess.Popen([sys.executable, "-u", "-c", BENCH, str(plain)], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        while "rounds of" not in bench.stdout.readline():
            assert bench.poll() is None
        children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children").read_text().split()
        bench.kill()
        bench.wait()
    assert children
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


class Shaped:
    """A session that takes one input of a shape."""

    def __init__(self, shape):
        self.inputs = [type("Input", (), {"name": "images", "shape": shape, "type": "tensor(float)"})()]

    def get_inputs(self):
        return self.inputs


@pytest.mark.parametrize("shape", [["b", 100_000, 10_000], ["b", 2**40, 2**40], ["b", 0, 3], [10**10, 3]])
def test_inputs_of_absurd_sizes_are_refused_before_any_memory_is_taken(shape):
    batch = shape[0] if isinstance(shape[0], int) else 1
    with pytest.raises(runner.Refused, match=r"m: its input is \[.*values; 1 to 268,435,456 .*export it for images"):
        runner.input_of(Shaped(shape), "m", batch)
    assert runner.input_of(Shaped(["b", 3, 224, 224]), "m", 8) == ("images", (8, 3, 224, 224))
