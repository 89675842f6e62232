"""A latency report holds what it says; how fast anything is, is not asserted."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export import Sample, expect, measure_interleaved, measure_latency, write_view
from export.devices.links import LocalLink


@pytest.fixture
def model(residual, tmp_path):
    return write_view(residual, [(1, 3, 15, 15)], tmp_path / "n.onnx").path


@pytest.fixture
def images():
    return np.random.default_rng(0).standard_normal((20, 3, 15, 15), dtype=np.float32)


def test_report(model):
    report = measure_latency(model, batch_size=3, warmup=2, rounds=30, affinity=(0,))
    assert 0 < report.min_ms <= report.p10_ms <= report.median_ms <= report.p90_ms <= report.p99_ms
    assert report.first_run_ms > 0 and report.load_ms > 0
    assert report.size_bytes == model.stat().st_size
    assert report.input_shape == (3, 3, 15, 15)
    assert (report.threads, report.rounds, report.warmup, report.device) == (1, 30, 2, "local")
    assert report.machine["onnxruntime"] and report.machine["cpu"]
    assert 10e6 < report.runtime_memory_bytes < report.peak_memory_bytes < 2e9
    assert report.repacked == () and report.images == 0 and report.accuracy is None
    assert json.loads(json.dumps(report.to_json()))["median_ms"] == report.median_ms


def test_a_sample_is_scored_where_the_model_runs(model, images):
    wrong = np.roll(expect(Sample(images), {"model": model}).logits["model"], 1, axis=1)
    right = expect(Sample(images), {"model": model}).logits["model"]
    sample = Sample(images, right.argmax(1), {"model": np.where(np.arange(len(images))[:, None] < 5, wrong, right)})
    report = measure_latency(model, warmup=0, rounds=1, sample=sample, memory=False)
    differing = (wrong[:5].argmax(1) != right[:5].argmax(1)).sum()
    assert report.images == 20 and report.accuracy == 1.0
    assert report.agreement == 1 - differing / 20 and differing
    assert report.max_difference == pytest.approx(np.abs(wrong - right)[:5].max())
    assert report.peak_memory_bytes is None


def test_a_sample_that_does_not_fit(model, images):
    with pytest.raises(ValueError, match="takes images .*15, 15.*sample"):
        measure_latency(model, warmup=0, rounds=1, sample=Sample(images[:, :, 1:]), memory=False)
    logits = {"model": np.zeros((len(images), 7), np.float32)}
    with pytest.raises(ValueError, match=r"expected logits are \(20, 7\), found \(20, 5\)"):
        measure_latency(model, warmup=0, rounds=1, sample=Sample(images, logits=logits), memory=False)


def test_threads_are_counted_against_the_cpus_they_are_pinned_to(model):
    assert "2 threads on 1 core" in measure_latency(model, threads=2, rounds=2, affinity=(0,), memory=False).notes


def test_a_file_that_is_replaced_meanwhile_is_refused(model, images, monkeypatch):
    """Its hash and size would be those of the new file, its times those of the old one."""
    content, real = model.read_bytes(), LocalLink.run
    assert measure_latency(model, rounds=2, memory=False).sha256 == hashlib.sha256(content).hexdigest()

    def replacing(link, job, files, say):
        answer = real(link, job, files, say)
        model.write_bytes(content + b"\x00")
        return answer

    monkeypatch.setattr(LocalLink, "run", replacing)
    with pytest.raises(ValueError, match=r"n\.onnx: changed while it was measured, .*measure again"):
        measure_latency(model, rounds=2, memory=False)


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
        ({"on": "pi"}, "device 'pi' is not an address; it must be local, ssh://"),
        ({"affinity": (-1,)}, "affinity must be numbers of CPUs from 0 on"),
        ({"affinity": (9999,)}, r"affinity \[9999\]: Invalid argument; this process may use CPUs \[0"),
        ({"affinity": (0, 9998, 9999)}, r"affinity \[0, 9998, 9999\]: CPUs \[9998, 9999\] are not there"),
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
