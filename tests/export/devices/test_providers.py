"""Providers: names that people write, what is left out, and the low-bit provider measured on this machine."""

from __future__ import annotations

import dataclasses
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export import Sample, expect, export_float, export_onnx, lowbit
from export.devices import Settings, as_device, measure_on, shipping
from export.devices.connections.address import Device, DeviceError
from export.devices.measuring import link_to
from export.devices.onboard import runner
from export.devices.perf_test import NO_PLUGIN, PerfTestLink
from export.devices.providers import Entry, as_job, entries_of, left_out, provider_names
from export.devices.shipping import is_new_enough, library_for
from export.lowbit import LowBitUnavailableError
from quantizers import QuantSpec, calibrate, prepare

CPU, LOW_BIT = "CPUExecutionProvider", "LowBitExecutionProvider"
QUICK = Settings(warmup=1, rounds=4, memory=False)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["auto"], ("auto",)),
        (["cpu,lowbit"], (CPU, LOW_BIT)),
        (["lowbit", " cpu "], (LOW_BIT, CPU)),
        (["XnnpackExecutionProvider,"], ("XnnpackExecutionProvider",)),
    ],
)
def test_names_that_people_write(words, names):
    assert provider_names(words) == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no provider is named"),
        ([" , "], "no provider is named"),
        (["cpu", CPU], "named twice: cpu, CPUExecutionProvider"),
        (["auto,cpu"], "auto chooses the providers by itself"),
    ],
)
def test_names_that_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        Settings(providers=tuple(words))


def test_a_model_has_an_entry_a_provider_and_a_name_each():
    assert [entry.title for entry in entries_of(["a"], ["auto"])] == ["a", "a, low-bit provider"]
    assert [entry.title for entry in entries_of(["a"], [LOW_BIT])] == ["a, low-bit provider"]
    assert [entry.title for entry in entries_of(["a"], ["XnnpackExecutionProvider"])] == ["a"], "as it always was"
    titles = [entry.title for entry in entries_of(["a", "b"], [CPU, "XnnpackExecutionProvider"])]
    assert titles == ["a", "a, Xnnpack provider", "b", "b, Xnnpack provider"]
    with pytest.raises(ValueError, match="two measurements would be called 'a, low-bit provider'"):
        entries_of(["a", "a, low-bit provider"], ["auto"])


def test_only_entries_that_may_be_left_out_are():
    entries = entries_of(["a"], ["auto"])
    assert left_out({"left_out": {"0": "no", "1": "nothing"}}, entries) == {1: "nothing"}
    assert left_out({}, entries) == left_out({"left_out": 3}, entries) == {}
    assert left_out({"left_out": {"0": "no"}}, entries_of(["a"], [LOW_BIT])) == {}
    job = [as_job(entry, n, "0.onnx") for n, entry in enumerate(entries)]
    assert [one["where_nothing"] for one in job] == ["run", "leave out"] and [one["optional"] for one in job] == [
        False,
        True,
    ]
    assert as_job(entries_of(["a"], [LOW_BIT])[0], 0, "0.onnx")["where_nothing"] == "cpu"


class Wide(nn.Module):
    """Three convolutions that the low-bit provider takes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.more, self.head = nn.Conv2d(32, 32, 3), nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.stem, self.body, self.more):
            x = torch.relu(layer(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def files(eager: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A student of two bits and its float net."""
    torch.manual_seed(0)
    folder, images, net = tmp_path_factory.mktemp("files"), torch.randn(16, 3, 8, 8), Wide().eval()
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), images[:2])
    calibrate(student, images)
    paths = {"student": folder / "student.onnx", "teacher": folder / "teacher.onnx"}
    export_onnx(student.eval(), images[:2], paths["student"])
    export_float(net, images[:2], paths["teacher"])
    return paths


@pytest.fixture
def offered() -> None:
    found = lowbit.availability()
    if not found.is_offered:
        pytest.skip(found.reason)


def sampled(files: dict[str, Path]) -> Sample:
    images = np.random.default_rng(0).standard_normal((20, 3, 8, 8), dtype=np.float32)
    return expect(Sample(images, np.zeros(20, np.int64)), files)


def test_by_default_it_stands_beside_the_cpu_provider_where_it_takes_something(files, offered):
    reports = measure_on(
        as_device("local"), files, dataclasses.replace(QUICK, providers=("auto",)), sample=sampled(files)
    )
    assert list(reports) == ["student", "student, low-bit provider", "teacher"], "it takes nothing of a float file"
    plain, ours = reports["student"], reports["student, low-bit provider"]
    assert (plain.provider, ours.provider) == (CPU, LOW_BIT) and ours.claimed_nodes > 10
    assert (plain.model, ours.model, plain.claimed_nodes) == ("student", "student", None)
    assert ours.path == plain.path and ours.size_bytes == plain.size_bytes
    assert (plain.accuracy, plain.agreement, plain.max_difference) == (
        ours.accuracy,
        ours.agreement,
        ours.max_difference,
    )
    assert ours.agreement == 1.0 and ours.interleaved_with == ("student", "teacher")


def test_asked_for_alone_a_file_of_which_it_takes_nothing_runs_on_the_cpu_provider(files, offered):
    settings = dataclasses.replace(QUICK, providers=("lowbit",), memory=True)
    reports = measure_on(as_device("local"), files, settings)
    assert list(reports) == ["student, low-bit provider", "teacher"]
    assert reports["teacher"].provider == CPU and "takes nothing of this file" in reports["teacher"].notes[-1]
    assert reports["student, low-bit provider"].peak_memory_bytes > 1e6


def test_asked_for_beside_the_cpu_provider_what_it_does_not_take_is_said(files, offered):
    said = "not measured with the low-bit provider: it takes nothing of this file"
    named = measure_on(as_device("local"), files, dataclasses.replace(QUICK, providers=("cpu,lowbit",)))
    assert list(named) == ["student", "student, low-bit provider", "teacher"]
    assert said in named["teacher"].notes and said not in named["student"].notes
    by_default = measure_on(as_device("local"), files, dataclasses.replace(QUICK, providers=("auto",)))
    assert said not in by_default["teacher"].notes


def test_two_models_that_wait_busily_are_never_in_one_run(files, offered):
    settings = dataclasses.replace(QUICK, providers=("auto",), threads=2)
    assert not measure_on(as_device("local"), {"s": files["student"]}, settings)["s"].spinning
    assert measure_on(as_device("local"), {"t": files["teacher"]}, settings)["t"].spinning


def test_where_it_is_not_offered_auto_measures_without_and_says_why(files, monkeypatch):
    monkeypatch.setenv("QKD_LOWBIT", "0")
    said: list[str] = []
    settings = dataclasses.replace(QUICK, providers=("auto",))
    reports = measure_on(as_device("local"), files, settings, say=said.append)
    assert list(reports) == ["student", "teacher"]
    assert "low-bit provider: switched off by QKD_LOWBIT=0; the CPU provider runs everything" in said
    with pytest.raises(ValueError, match="student: the low-bit provider is not offered here: switched off"):
        measure_on(as_device("local"), files, dataclasses.replace(QUICK, providers=("lowbit",)))


class Session:
    """Stands in for a session; its outputs are given."""

    def __init__(self, values, taken):
        self.values, self.session, self.taken = values, self, taken

    def outputs_now(self):
        return [type("Value", (), {"numpy": lambda _: self.values})()]

    def get_provider_graph_assignment_info(self):
        part = type("Part", (), {"ep_name": LOW_BIT, "get_nodes": lambda _: [1] * self.taken})
        return [part()] if self.taken else []


@pytest.mark.parametrize("other", [[1.0, 2.0], [1.0, np.nextafter(np.float32(2), np.float32(3))]])
def test_outputs_that_differ_in_one_bit_are_refused_before_anything_is_measured(other, monkeypatch):
    made = iter([Session(np.array([1, 2], np.float32), 0), Session(np.array(other, np.float32), 7)])
    monkeypatch.setattr(runner, "Timed", lambda *_: next(made))
    entry = {"name": "m", "title": "m, low-bit provider"}
    if other[1] == 2.0:
        assert runner.compare_low_bit(None, {"sample": None}, entry, "") == 7
    else:
        with pytest.raises(runner.Refused, match="m, low-bit provider: its outputs are not those of the CPU provider"):
            runner.compare_low_bit(None, {"sample": None}, entry, "")


class Runtime:
    """Stands in for onnxruntime of a version; takes note of what is registered."""

    def __init__(self, version: str) -> None:
        self.__version__, self.registered = version, []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))


def test_the_runner_says_why_it_cannot_register(tmp_path, monkeypatch):
    job = {"low_bit": None, "why_no_low_bit": "no compiler"}
    assert runner.register_low_bit(Runtime("1.22.1"), job, "") == "needs onnxruntime 1.23 or newer, this is 1.22.1"
    assert runner.register_low_bit(Runtime("1.23.0"), job, "") == "no compiler"
    (tmp_path / "l.so").write_bytes(b"\x7fELF, of another machine")
    why = runner.register_low_bit(Runtime("1.23.0"), {**job, "low_bit": "l.so"}, str(tmp_path))
    assert why.startswith("its library cannot be loaded: ")


def test_the_package_on_the_device_goes_before_the_library_that_is_sent(offered, tmp_path, monkeypatch):
    (tmp_path / "onnxruntime_ep_lowbit.py").write_text(
        f"def get_library_path():\n    return {str(lowbit.library_path())!r}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_lowbit", raising=False)
    runtime = Runtime("1.32.0")
    assert runner.register_low_bit(runtime, {"low_bit": "none.so", "why_no_low_bit": ""}, "/nowhere") == ""
    assert runtime.registered == [(LOW_BIT, str(lowbit.library_path()))]
    monkeypatch.delitem(sys.modules, "onnxruntime_ep_lowbit")


@pytest.mark.parametrize(
    ("version", "is_new"), [("1.23.0", True), ("1.32.0", True), ("2.0.0", True), ("1.22.9", False), ("x.y", False)]
)
def test_versions_that_take_plugins(version, is_new):
    assert is_new_enough(version) is is_new


def test_devices_that_no_library_is_for(monkeypatch):
    probe = link_to(as_device("local")).probe()
    old = dataclasses.replace(probe, machine={**probe.machine, "onnxruntime": "1.20.0"})
    with pytest.raises(LowBitUnavailableError, match=r"needs onnxruntime 1\.23 or newer, the device has 1\.20\.0"):
        library_for(old)
    odd = dataclasses.replace(probe, machine={**probe.machine, "architecture": "riscv64"})
    with pytest.raises(LowBitUnavailableError, match="no kernels for the processor family riscv64"):
        library_for(odd)
    arm = dataclasses.replace(probe, machine={**probe.machine, "architecture": "aarch64"})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if platform.machine() != "aarch64":
        with pytest.raises(LowBitUnavailableError, match="the cross-compiler is missing: pip install ziglang"):
            library_for(arm)
    monkeypatch.setenv("QKD_LOWBIT", "0")
    with pytest.raises(LowBitUnavailableError, match="switched off by QKD_LOWBIT=0"):
        library_for(probe)


def test_a_device_gets_the_library_of_its_processor_family(monkeypatch):
    probe = link_to(as_device("local")).probe()
    monkeypatch.setattr(shipping, "library_path", lambda: Path("of-this-machine.so"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert library_for(probe) == Path("of-this-machine.so"), "no cross-compiler"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(shipping, "built_library", lambda toolchain: Path(f"for-{toolchain.machine}.so"))
    for family in ("aarch64", "x86_64"):
        device = dataclasses.replace(probe, machine={**probe.machine, "architecture": family})
        assert library_for(device) == Path(f"for-{family}.so")


def test_the_perf_test_tool_leaves_out_what_it_is_not_sure_to_take(monkeypatch):
    device = Device("ssh://a", perf_test="/opt/perf_test")
    link = PerfTestLink(device, None)  # type: ignore[arg-type]
    entry = as_job(Entry("m", LOW_BIT), 0, "0.onnx")
    with pytest.raises(ValueError, match="provider 'LowBitExecutionProvider' is not one of"):
        link.run({"batch_size": 1, "models": [entry]}, {}, None)
    assert NO_PLUGIN.startswith("onnxruntime_perf_test")


def test_a_device_that_leaves_out_what_it_must_measure_is_no_answer(files, monkeypatch):
    from export.devices import measuring

    class Liar(measuring.LocalLink):
        def run(self, job, given, say):
            answer = super().run(job, given, say)
            answer["models"].pop("0")
            answer["left_out"] = {"0": "no wish"}
            return answer

    monkeypatch.setattr(measuring, "LocalLink", Liar)
    with pytest.raises(DeviceError, match="is not what the runner writes"):
        measure_on(as_device("local"), {"t": files["teacher"]}, QUICK)
