"""A latency report holds what it says; how fast anything is, is not asserted."""

from __future__ import annotations

import json

import onnx
import pytest
from onnx import TensorProto, helper

import export.machine
from export import measure_interleaved, measure_latency, write_view


@pytest.fixture
def model(residual, tmp_path):
    return write_view(residual, [(1, 3, 15, 15)], tmp_path / "n.onnx").path


def test_report(model):
    report = measure_latency(model, batch_size=3, warmup=2, rounds=30)
    assert 0 < report.min_ms <= report.p10_ms <= report.median_ms <= report.p90_ms <= report.p99_ms
    assert report.first_run_ms > 0 and report.load_ms > 0
    assert report.size_bytes == model.stat().st_size
    assert report.input_shape == (3, 3, 15, 15)
    assert (report.threads, report.rounds, report.warmup, report.device) == (1, 30, 2, "local")
    assert report.machine["onnxruntime"] and report.machine["cpu"]
    assert json.loads(json.dumps(report.to_json()))["median_ms"] == report.median_ms


def test_models_take_turns(model, monkeypatch):
    order = []
    import export.latency as latency

    run = latency._Timed.run
    monkeypatch.setattr(latency._Timed, "run", lambda self: order.append(id(self)) or run(self))
    reports = measure_interleaved({"a": model, "b": model}, warmup=0, rounds=4)
    assert reports["a"].interleaved_with == ("b",) and not reports["a"].spinning
    (first, second), turns = order[:2], order[2:]
    assert turns == [first, second, second, first, first, second, second, first]


def test_threads_spin_only_when_alone(model):
    assert measure_latency(model, threads=2, warmup=0, rounds=1).spinning
    assert not measure_interleaved({"a": model, "b": model}, threads=2, warmup=0, rounds=1)["a"].spinning


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"on": "ssh://pi"}, "device 'ssh://pi' is not there yet"),
        ({"provider": "Abacus"}, "provider 'Abacus' is not in this onnxruntime"),
    ],
)
def test_arguments_out_of_range(model, options, message):
    with pytest.raises(ValueError, match=message):
        measure_latency(model, **options)


def test_missing_model_and_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model file at .*none\.onnx"):
        measure_latency(tmp_path / "none.onnx")
    with pytest.raises(ValueError, match="no model to measure"):
        measure_interleaved({})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([("x", TensorProto.FLOAT, [4, 3])], "its batch is fixed at 4, but batch_size is 1"),
        ([("x", TensorProto.FLOAT, ["n", "m"])], "only the batch may be free"),
        ([("x", TensorProto.INT64, ["n", 3])], "measured for one float32 input, found x: tensor"),
        ([("x", TensorProto.FLOAT, ["n", 3]), ("y", TensorProto.FLOAT, ["n", 3])], "one float32 input, found x"),
    ],
)
def test_inputs_that_cannot_be_filled(tmp_path, inputs, message):
    path = tmp_path / "other.onnx"
    given = [helper.make_tensor_value_info(*entry) for entry in inputs]
    ends = [helper.make_tensor_value_info(f"{name}_out", kind, shape) for name, kind, shape in inputs]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in inputs]
    graph = helper.make_graph(nodes, "other", given, ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with pytest.raises(ValueError, match=message):
        measure_latency(path, warmup=0, rounds=1)


def test_machine_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(export.machine, "CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(export.machine, "FREQUENCY", tmp_path / "none")
    machine = export.machine.describe_machine("1.2.3")
    assert machine["cpu"] and machine["cpu_flags"] == [] and machine["governor"] is None
    assert export.machine.frequency_mhz() is None


def test_machine_on_arm(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp crc32\n")
    (tmp_path / "scaling_cur_freq").write_text("1500000\n")
    (tmp_path / "scaling_governor").write_text("ondemand\n")
    monkeypatch.setattr(export.machine, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(export.machine, "FREQUENCY", tmp_path)
    machine = export.machine.describe_machine("1.2.3")
    assert machine["cpu_flags"] == ["asimd", "asimddp"] and machine["governor"] == "ondemand"
    assert export.machine.frequency_mhz() == 1500.0
