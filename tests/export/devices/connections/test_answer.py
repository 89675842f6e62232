"""A device's answer is taken apart with suspicion."""

from __future__ import annotations

import copy
import json

import pytest

from export import DeviceError
from export.devices.connections.answer import read_answer
from export.devices.connections.capture import Captured
from export.devices.probing import read_probe
from export.devices.report import measured

ROW = {
    "median_ms": 1.5, "p10_ms": 1.0, "p90_ms": 2, "p99_ms": 3.0, "min_ms": 0.9, "first_run_ms": 4.0, "load_ms": 10.0,
    "input_shape": [1, 3, 8, 8], "notes": ["noisy"], "peak_memory_bytes": 1000, "accuracy": 0.5,
}  # fmt: skip
END = {"frequency_mhz": 1500.0, "temperature_c": None, "load": 0.5}
MACHINE = {"cpu": "a", "cpu_flags": ["avx2"], "cores": 4, "memory_bytes": 8, "onnxruntime": "1.31"}
GOOD = {"models": {"m": ROW}, "machine": MACHINE, "before": END, "after": END, "notes": ["busy"]}


def answer(body, *, code=0, stderr="", token="t"):
    return read_answer(Captured(code, f"Welcome!\n<<<qkd {token}\n{body}\nqkd {token}>>>\nbye".encode(), stderr), "t")


def test_an_answer_is_found_among_greetings_and_made_printable():
    found = answer(json.dumps({"a": ["\x1b[31mred\x07", 1.5, None, True], "\x1b[2Jkey": "x" * 5000}))
    assert found["a"] == ["red", 1.5, None, True]
    assert len(found["key"]) < 2100
    assert answer('{"a": NaN, "b": Infinity, "c": 1e999}') == {"a": None, "b": None, "c": None}


@pytest.mark.parametrize(
    ("captured", "words"),
    [
        (Captured(0, b"", ""), "gave no answer (exit code 0): it said nothing"),
        (Captured(1, b"<<<qkd other\n{}\nqkd other>>>", "Traceback"), "no answer (exit code 1): Traceback"),
        (Captured(0, b"<<<qkd t\n{}", ""), "gave no answer"),
        (Captured(127, b"", "sh: python3: not found"), "could not be started (sh: python3: not found): name one"),
        (Captured(126, b"", "Permission denied"), "could not be started"),
        (Captured(1, b"", "SyntaxError: future feature annotations is not defined"), "must be 3.8 or newer"),
        (Captured(132, b"", ""), "an illegal instruction (signal 4)"),
        (Captured(-11, b"", ""), "a crash (signal 11)"),
        (Captured(137, b"", "Killed"), "a kill (out of memory?) (signal 9); last output: Killed"),
        (Captured(142, b"", ""), "its time limit (signal 14)"),
    ],
)
def test_no_answer(captured, words):
    with pytest.raises(DeviceError) as caught:
        read_answer(captured, "t")
    assert words in str(caught.value)


@pytest.mark.parametrize("body", ["{", "[" * 5000, '{"a": ' * 20 + "1" + "}" * 20, "9" * 6000, '"text"', "[1]", ""])
def test_not_the_json_of_the_runner(body):
    with pytest.raises(DeviceError, match=r"is not JSON|no group of keys"):
        answer(body)


def test_what_the_runner_refuses_is_the_users_and_what_fails_the_devices():
    with pytest.raises(ValueError, match="no such provider"):
        answer('{"refused": "no such provider"}')
    with pytest.raises(DeviceError, match="failed on the device: MemoryError"):
        answer('{"failed": "MemoryError"}')


def test_measured_fields():
    found = measured(GOOD, "m", entry="m")
    assert found["median_ms"] == 1.5 and found["p90_ms"] == 2.0 and found["input_shape"] == (1, 3, 8, 8)
    assert found["notes"] == ("noisy", "busy") and found["agreement"] is None and found["accuracy"] == 0.5
    assert found["frequency_mhz"] == (1500.0, 1500.0) and found["temperature_c"] == (None, None)
    assert found["machine"]["cores"] == 4 and found["images"] == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("models",), {}), (("models",), None), (("models", "m"), 3), (("models", "m", "median_ms"), -1),
        (("models", "m", "median_ms"), "1"), (("models", "m", "median_ms"), None), (("models", "m", "p90_ms"), True),
        (("models", "m", "load_ms"), 1e300), (("models", "m", "input_shape"), 3), (("models", "m", "accuracy"), 1.5),
        (("models", "m", "agreement"), -0.1), (("models", "m", "images"), "many"), (("models", "m", "notes"), None),
        (("machine",), None), (("machine", "cores"), "4"), (("machine", "cpu_flags"), None), (("before",), []),
        (("after", "load"), "high"), (("notes",), None), (("models", "m", "input_shape"), ["x"]),
    ],
)  # fmt: skip
def test_figures_that_cannot_be(path, value):
    wrong = copy.deepcopy(GOOD)
    at = wrong
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(DeviceError, match="not what the runner writes"):
        measured(wrong, "m", entry="m")


PROBE = {
    "machine": {**MACHINE, "numpy": "2"}, "loads": {"int8": True, "int4": False, "float9": True}, "providers": ["C"],
    "memory_available_bytes": 5, "free_disk_bytes": None, "runtime_error": None, "executable": "/py",
}  # fmt: skip


def test_a_probe():
    probe = read_probe(PROBE)
    probe.check()
    probe.check_room(10**12)
    assert probe.loads == ("int8",) and probe.python == "/py" and json.dumps(probe.to_json())
    with pytest.raises(
        DeviceError,
        match="/py has no working onnxruntime .gone.*-m venv env; env/bin/pip install onnxruntime numpy.*--python env/",
    ):
        read_probe({**PROBE, "runtime_error": "gone"}).check()
    with pytest.raises(DeviceError, match="no working numpy"):
        read_probe({**PROBE, "machine": MACHINE}).check()
    with pytest.raises(DeviceError, match="onnxruntime 1.31 there loads none"):
        read_probe({**PROBE, "loads": {}}).check()
    with pytest.raises(DeviceError, match=r"2,000 bytes must be copied, 1,999 are free there"):
        read_probe({**PROBE, "free_disk_bytes": 1999}).check_room(2000)


@pytest.mark.parametrize("key", list(PROBE))
def test_a_probe_that_lacks_a_key(key):
    with pytest.raises(DeviceError, match="not the runner's"):
        read_probe({name: value for name, value in PROBE.items() if name != key})
