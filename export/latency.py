"""Measure how long ONNX files take on this machine, interleaved."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from export.machine import describe_machine, frequency_mhz
from export.runtime import CPU, open_session, runtime

NS_PER_MS = 1e6


@dataclass(frozen=True)
class LatencyReport:
    """What one model took, in milliseconds an inference of a whole batch.

    Args:
        path: The model file.
        device: Where it ran.
        median_ms: Median of the timed inferences; the figure to compare.
        p10_ms: Tenth percentile.
        p90_ms: Ninetieth percentile.
        p99_ms: Ninety-ninth percentile.
        min_ms: Fastest.
        first_run_ms: The first inference after loading.
        load_ms: Opening the session, optimisation included.
        size_bytes: Size of the file.
        input_shape: Shape of the input, batch first.
        threads: Intra-op threads.
        provider: Execution provider.
        spinning: Whether idle threads waited busily.
        warmup: Untimed inferences before the clock started.
        rounds: Timed inferences.
        interleaved_with: Other models that took turns with it.
        frequency_mhz: Of the first core, before and after; None where unreadable.
        machine: CPU, flags, governor, kernel, versions.
    """

    path: str
    device: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    first_run_ms: float
    load_ms: float
    size_bytes: int
    input_shape: tuple[int, ...]
    threads: int
    provider: str
    spinning: bool
    warmup: int
    rounds: int
    interleaved_with: tuple[str, ...]
    frequency_mhz: tuple[float | None, float | None]
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def measure_latency(
    path: str | PathLike[str],
    *,
    on: str = "local",
    threads: int = 1,
    batch_size: int = 1,
    warmup: int = 20,
    rounds: int = 200,
    provider: str = CPU,
    seed: int = 0,
) -> LatencyReport:
    """Measure one model; see ``measure_interleaved`` for the arguments.

    Two models are compared by one ``measure_interleaved`` call, not by two of these: a machine's speed drifts.
    """
    settings = {"threads": threads, "batch_size": batch_size, "warmup": warmup, "rounds": rounds, "seed": seed}
    return measure_interleaved({"model": path}, on=on, provider=provider, **settings)["model"]


def measure_interleaved(
    paths: Mapping[str, str | PathLike[str]],
    *,
    on: str = "local",
    threads: int = 1,
    batch_size: int = 1,
    warmup: int = 20,
    rounds: int = 200,
    provider: str = CPU,
    seed: int = 0,
) -> dict[str, LatencyReport]:
    """Measure several models in turns, so that drift and noise of the machine meet all of them alike.

    Every round runs each model once, and the order rotates from round to round. The clock is around
    ``session.run`` alone, with the input prepared.

    Args:
        paths: Name -> ONNX file with one float32 input, its first axis the batch.
        on: The device; ``local`` is this machine.
        threads: Intra-op threads of ONNX Runtime, at least 1.
        batch_size: Images an inference; must be the model's own where that is fixed.
        warmup: Untimed inferences a model, after the first.
        rounds: Timed inferences a model, at least 1.
        provider: Execution provider by onnxruntime's name.
        seed: Of the normally distributed images.

    Returns:
        Name -> report.

    Raises:
        ValueError: If an argument is out of range, the device or provider is unknown, or a model's input cannot be
            filled (several inputs, free axes besides the batch, another dtype).
        FileNotFoundError: If a file does not exist.
        ImportError: If onnxruntime is missing.
    """
    _check_settings(paths, on, batch_size, warmup, rounds)
    # threads of one session that wait busily would take the core from the session whose turn it is
    spinning = threads > 1 and len(paths) == 1
    before = frequency_mhz()
    models = {
        name: _Timed(Path(path), threads, batch_size, provider, seed, spinning=spinning) for name, path in paths.items()
    }
    for model in models.values():
        for _ in range(warmup):
            model.run()
    times = _take_turns(models, rounds)
    frequencies = (before, frequency_mhz())
    machine = describe_machine(str(runtime().__version__))
    return {
        name: LatencyReport(
            path=str(model.path),
            device=on,
            **_percentiles(times[name]),
            first_run_ms=model.first_run_ms,
            load_ms=model.load_ms,
            size_bytes=model.path.stat().st_size,
            input_shape=model.images.shape,
            threads=threads,
            provider=provider,
            spinning=spinning,
            warmup=warmup,
            rounds=rounds,
            interleaved_with=tuple(other for other in models if other != name),
            frequency_mhz=frequencies,
            machine=machine,
        )
        for name, model in models.items()
    }


def _check_settings(paths: Mapping[str, object], on: str, batch_size: int, warmup: int, rounds: int) -> None:
    if on != "local":
        raise ValueError(f"device {on!r} is not there yet; there is 'local'")
    if not paths:
        raise ValueError("there is no model to measure: `paths` is empty")
    for name, value, least in (("batch_size", batch_size, 1), ("warmup", warmup, 0), ("rounds", rounds, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


class _Timed:
    """A loaded model with its input prepared, run once."""

    def __init__(self, path: Path, threads: int, batch_size: int, provider: str, seed: int, *, spinning: bool) -> None:
        self.path = path
        start = time.perf_counter_ns()
        self.session = open_session(path, optimise=True, threads=threads, provider=provider, spinning=spinning)
        self.load_ms = (time.perf_counter_ns() - start) / NS_PER_MS
        self.input, shape = _input(self.session, path, batch_size)
        self.images = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.feeds = {self.input: runtime().OrtValue.ortvalue_from_numpy(self.images)}
        self.first_run_ms = self.run() / NS_PER_MS

    def run(self) -> int:
        """Run one inference; return what it took in nanoseconds."""
        start = time.perf_counter_ns()
        self.session.run_with_ort_values(self.outputs, self.feeds)
        return time.perf_counter_ns() - start


def _input(session: Any, path: Path, batch_size: int) -> tuple[str, tuple[int, ...]]:
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type != "tensor(float)":
        found = ", ".join(f"{entry.name}: {entry.type}" for entry in inputs)
        raise ValueError(f"{path}: latency is measured for one float32 input, found {found}")
    batch, *rest = inputs[0].shape
    if isinstance(batch, int) and batch != batch_size:
        raise ValueError(f"{path}: its batch is fixed at {batch}, but batch_size is {batch_size}")
    if not all(isinstance(size, int) for size in rest):
        raise ValueError(f"{path}: only the batch may be free, its input is {inputs[0].shape}")
    return inputs[0].name, (batch_size, *rest)


def _take_turns(models: Mapping[str, _Timed], rounds: int) -> dict[str, list[int]]:
    times: dict[str, list[int]] = {name: [] for name in models}
    order = list(models.items())
    for number in range(rounds):
        turn = number % len(order)
        for name, model in order[turn:] + order[:turn]:
            times[name].append(model.run())
    return times


def _percentiles(times_ns: Sequence[int]) -> dict[str, float]:
    p10, median, p90, p99 = np.percentile(np.asarray(times_ns) / NS_PER_MS, (10, 50, 90, 99))
    return {
        "median_ms": float(median),
        "p10_ms": float(p10),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "min_ms": min(times_ns) / NS_PER_MS,
    }
