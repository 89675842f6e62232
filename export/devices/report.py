"""The time of one model on one device, read from the runner's answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from export.devices.connections.address import DeviceError
from export.versions import arithmetic_note


@dataclass(frozen=True)
class LatencyReport:
    """The time of one model, in milliseconds per inference of a whole batch.

    Args:
        path: The model file.
        device: Where it ran.
        median_ms: Median of the timed inferences; the figure to compare.
        p10_ms: Tenth percentile; None if the device's tool does not give it.
        p90_ms: Ninetieth percentile.
        p99_ms: Ninety-ninth percentile.
        min_ms: Fastest.
        first_run_ms: The first inference after loading; None if the device's tool does not give it.
        load_ms: Opening the session, optimization included.
        size_bytes: Size of the measured file, repacked or not.
        input_shape: Shape of the input, batch first.
        threads: Intra-op threads.
        provider: Execution provider.
        spinning: Whether idle threads spun.
        warmup: Untimed inferences before the clock started.
        rounds: Timed inferences.
        interleaved_with: Other models that took turns with it.
        frequency_mhz: Highest of the cores, before and after; None if unreadable.
        machine: CPU, flags, governor, memory, kernel, versions.
        affinity: CPUs that the process was pinned to; empty for none.
        temperature_c: Of the hottest zone, before and after, in degrees Celsius; None if unreadable.
        load: One-minute load average, before and after; likewise.
        peak_memory_bytes: Peak resident memory of a separate process that loads the model and runs it once.
        runtime_memory_bytes: The share of Python and the runtime in it.
        images: Images of the sample that it was scored on; 0 without a sample.
        accuracy: Share of these whose best class is the label, 0..1; None without labels.
        agreement: Share of images whose best class is the expected one, 0..1; None without expected logits.
        max_difference: Largest absolute difference to the expected logits; likewise.
        repacked: Element types that the weights were stored in for this device; empty if the file ran unchanged.
        notes: What makes the figures doubtful: noise, throttling, other load.
        model: Name of the model; that of the report may also say the provider.
        claimed_nodes: Nodes that the low-bit provider took of the file; None under others, or if unknown.
        sha256: Of the file that was measured, before it was repacked.
    """

    path: str
    device: str
    median_ms: float
    p10_ms: float | None
    p90_ms: float
    p99_ms: float
    min_ms: float
    first_run_ms: float | None
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
    affinity: tuple[int, ...] = ()
    temperature_c: tuple[float | None, float | None] = (None, None)
    load: tuple[float | None, float | None] = (None, None)
    peak_memory_bytes: int | None = None
    runtime_memory_bytes: int | None = None
    images: int = 0
    accuracy: float | None = None
    agreement: float | None = None
    max_difference: float | None = None
    repacked: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    model: str = ""
    claimed_nodes: int | None = None
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


TIMES = ("median_ms", "p90_ms", "p99_ms", "min_ms", "load_ms")
SOMETIMES = ("p10_ms", "first_run_ms")  # onnxruntime_perf_test leaves them out
FRACTIONS = ("accuracy", "agreement")
COUNTS = ("peak_memory_bytes", "runtime_memory_bytes")
MACHINE_TEXTS = ("cpu", "architecture", "kernel", "governor", "python", "onnxruntime", "numpy")


def measured(answer: Mapping[str, Any], name: str, *, entry: str) -> dict[str, Any]:
    """Return the fields of a report that the runner measured, for one model.

    Args:
        answer: The runner's answer; its texts are printable already.
        name: The model, for messages.
        entry: Its key in the answer.

    Raises:
        DeviceError: If a figure is missing, of another type, or out of range.
    """
    try:
        row = answer["models"][entry]
        fields: dict[str, Any] = {key: _number(row[key], f"{name}.{key}") for key in TIMES}
        fields |= {key: _optional(row[key], f"{name}.{key}") for key in SOMETIMES}
        fields["input_shape"] = tuple(int(size) for size in row["input_shape"])
        fields |= {key: _optional(row.get(key), f"{name}.{key}", most=1) for key in FRACTIONS}
        fields |= {key: _whole(row.get(key), f"{name}.{key}") for key in COUNTS}
        fields["claimed_nodes"] = _whole(row.get("taken"), f"{name}.taken")
        fields["images"] = _whole(row.get("images", 0), f"{name}.images") or 0
        fields["max_difference"] = _optional(row.get("max_difference"), f"{name}.max_difference")
        fields["notes"] = tuple(map(str, [*row["notes"], *answer["notes"]]))
        ends = (answer["before"], answer["after"])
        for key in ("frequency_mhz", "temperature_c", "load"):
            fields[key] = tuple(_optional(end.get(key), key) for end in ends)
        fields["machine"] = known = _machine(answer["machine"])
        fields["notes"] += tuple(filter(None, [arithmetic_note(known["onnxruntime"], known["cpu_flags"])]))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise DeviceError(f"the device's answer is not what the runner writes: {error!r}") from error
    return fields


def as_run(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the device measured, which can differ from what was asked for: warm-up, rounds, spinning.

    Args:
        answer: The runner's answer.

    Raises:
        DeviceError: If one is missing, or of another type.
    """
    done = answer.get("done")
    if not isinstance(done, Mapping) or not isinstance(done.get("spinning"), bool):
        raise DeviceError(f"the device's answer is not what the runner writes: done is {str(done)[:40]!r}")
    counts = {key: int(_number(done.get(key), f"done.{key}")) for key in ("warmup", "rounds")}
    return {**counts, "spinning": done["spinning"]}


def _machine(value: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: None if value.get(key) is None else str(value[key]) for key in MACHINE_TEXTS}
    counts = {key: _whole(value.get(key), key) for key in ("cores", "memory_bytes")}
    return {**texts, "cpu": texts["cpu"] or "unknown", "cpu_flags": [str(one) for one in value["cpu_flags"]], **counts}


def _number(value: Any, where: str, *, most: float = 1e15) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise DeviceError(f"the device's answer is not what the runner writes: {where} is {str(value)[:40]!r}")
    return float(value)


def _optional(value: Any, where: str, *, most: float = 1e15) -> float | None:
    return None if value is None else _number(value, where, most=most)


def _whole(value: Any, where: str) -> int | None:
    return None if value is None else int(_number(value, where))
