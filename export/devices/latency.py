"""Measure how long ONNX files take, interleaved, on this machine or on a device."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike

from export.defaults import BATCH_SIZE, ROUNDS, THREADS, WARMUP
from export.devices.connections.address import Device, as_device
from export.devices.measuring import Settings, measure_on
from export.devices.report import LatencyReport as LatencyReport
from export.runtime import CPU
from export.sample import Sample


def measure_latency(
    path: str | PathLike[str],
    *,
    on: str | Device = "local",
    threads: int = THREADS,
    batch_size: int = BATCH_SIZE,
    warmup: int = WARMUP,
    rounds: int = ROUNDS,
    provider: str = CPU,
    affinity: tuple[int, ...] = (),
    seed: int = 0,
    sample: Sample | None = None,
    memory: bool = True,
) -> LatencyReport:
    """Measure one model.

    To compare two models, call ``measure_interleaved`` once instead of this twice: a machine's speed drifts.

    Args:
        path: ONNX file with one float32 input, its first axis the batch.
        on: ``local`` (this machine), ``ssh://[user@]host[:port]``, ``adb://SERIAL``, or an ``export.Device``.
        threads: Intra-op threads of ONNX Runtime, at least 1.
        batch_size: Images per inference; must be the model's own if that is fixed.
        warmup: Untimed inferences, after the first; not negative.
        rounds: Timed inferences, at least 1.
        provider: Execution provider by onnxruntime's name.
        affinity: CPUs that the process is pinned to; empty for none.
        seed: Seed of the normally distributed images.
        sample: Images to score the model on, where it runs; its expected logits go by the name ``model``.
        memory: Whether the model's peak memory is measured, in a separate process.

    Returns:
        Median, p10 and p90 in ms, and how and where they were measured.

    Raises:
        ValueError: If an argument is out of range, the address has an unknown form, the provider is unknown, or the
            model's input cannot be filled (several inputs, free axes besides the batch, another dtype).
        FileNotFoundError: If the file does not exist.
        OSError: If it cannot be read.
        ImportError: If onnxruntime is missing.
        DeviceError: If a device cannot be reached, lacks something, or fails.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from export import export_onnx
        >>> from quantizers import QuantSpec, calibrate, prepare
        >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(16, 1, 8, 8)
        >>> student = prepare(net, QuantSpec(), images)
        >>> calibrate(student, images)
        >>> exported = export_onnx(student.eval(), images, "student.onnx")
        >>> report = measure_latency(exported.path, warmup=1, rounds=5, memory=False)
        >>> 0 < report.p10_ms <= report.median_ms <= report.p90_ms
        True
    """
    settings = Settings(threads, batch_size, warmup, rounds, (provider,), tuple(affinity), seed, memory)
    (report,) = measure_on(as_device(on), {"model": path}, settings, sample=sample).values()
    return report


def measure_interleaved(
    paths: Mapping[str, str | PathLike[str]],
    *,
    on: str | Device = "local",
    threads: int = THREADS,
    batch_size: int = BATCH_SIZE,
    warmup: int = WARMUP,
    rounds: int = ROUNDS,
    provider: str = CPU,
    affinity: tuple[int, ...] = (),
    seed: int = 0,
    sample: Sample | None = None,
    memory: bool = True,
) -> dict[str, LatencyReport]:
    """Measure several models interleaved, so that drift and noise of the machine affect all of them alike.

    Every round runs each model once, and the order rotates from round to round. The clock is around the inference
    alone, with the input prepared. It runs in a separate process; on a device, from a copy of the same file.

    Args:
        paths: Name -> ONNX file with one float32 input, its first axis the batch.
        on: ``local`` (this machine), ``ssh://[user@]host[:port]``, ``adb://SERIAL``, or an ``export.Device``.
        threads: Intra-op threads of ONNX Runtime, at least 1.
        batch_size: Images per inference; must be the model's own if that is fixed.
        warmup: Untimed inferences per model, after the first.
        rounds: Timed inferences per model, at least 1.
        provider: Execution provider by onnxruntime's name.
        affinity: CPUs that the process is pinned to; empty for none.
        seed: Seed of the normally distributed images.
        sample: Images with expected logits, to score the models on where they run (``export.read_sample``).
        memory: Whether each model's peak memory is measured, in a separate process.

    Returns:
        Name -> report.

    Raises:
        ValueError: If an argument is out of range, the address has an unknown form, the provider is unknown, or a
            model's input cannot be filled (several inputs, free axes besides the batch, another dtype).
        FileNotFoundError: If a file does not exist.
        ImportError: If onnxruntime is missing.
        DeviceError: If a device cannot be reached, lacks something, or fails.
        OSError: If a file cannot be read.
    """
    settings = Settings(threads, batch_size, warmup, rounds, (provider,), tuple(affinity), seed, memory)
    return measure_on(as_device(on), paths, settings, sample=sample)
