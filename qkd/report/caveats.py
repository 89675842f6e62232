"""What a reader of a run's figures must know: chance level, small test sets, a slow student, and why."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qkd.units import counted, percent

NORMAL_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
SMALL_HALF_WIDTH = 0.01  # an accuracy known to within a point or less needs no caveat
SLOWER = 1.02  # medians of two measurements of one file differ by up to about 2 %
DOT_PRODUCT = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm")
BASELINE = "int8-static"
LOW_BIT = "low-bit provider"  # as in the row names of a measurement
NAMED = 3  # layers and notes that are named; the rest are counted


def wilson(fraction: float, count: int) -> tuple[float, float]:
    r"""Return Wilson's 95 % interval of a proportion.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}

    Args:
        fraction: Observed proportion, 0..1.
        count: Number of observations, positive.

    Returns:
        Its ends, 0..1.

    References:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    square = NORMAL_95**2
    middle = fraction + square / (2 * count)
    half = NORMAL_95 * math.sqrt(fraction * (1 - fraction) / count + square / (4 * count**2))
    whole = 1 + square / count
    # at 0 and 1 one end is exact; rounding must not move it outside
    return (middle - half) / whole if fraction else 0.0, (middle + half) / whole if fraction < 1 else 1.0


def interval_text(interval: tuple[float, float]) -> str:
    """Return an interval in percent with one decimal."""
    return f"{100 * interval[0]:.1f} .. {100 * interval[1]:.1f} %"


def accuracy_caveats(results: Mapping[str, Mapping[str, Any]], count: int | None) -> Iterator[str]:
    """Yield what limits the accuracies of a run.

    Args:
        results: ``teacher``, ``float``, ``student`` -> content of ``result.json``, empty if there is none.
        count: Number of test images; None if unknown.
    """
    if count is None:
        return
    for role, result in results.items():
        accuracy, chance = result.get("test_accuracy"), result.get("chance_accuracy")
        if accuracy is None or chance is None:
            continue
        low, high = wilson(accuracy, count)
        if low <= chance:
            name = {"float": "float twin"}.get(role, role)
            name = f"{name}'s first member" if result.get("members") else name
            yield (
                f"the {name} is at chance level: {percent(accuracy)} (95 % interval {interval_text((low, high))}), "
                f"where always naming the most frequent class gives {percent(chance)}{_after(role, result)}"
            )
    batch = results.get("student", {}).get("batch_statistics")
    if batch is not None:
        yield (
            f"accuracies use batch norm with the statistics of each batch of {batch} test images "
            f"(data.batch_statistics); figures by class come from the exported file, which uses the running statistics"
        )
    student = results.get("student", {}).get("test_accuracy")
    if student is not None:
        low, high = wilson(student, count)
        if (half := (high - low) / 2) > SMALL_HALF_WIDTH:
            yield (
                f"the test set has only {count:,} images: the student's accuracy is known to "
                f"±{100 * half:.1f} points (`qkd compare` compares runs image by image, which is more precise)"
            )


def _after(role: str, result: Mapping[str, Any]) -> str:
    epochs = result.get("epochs")
    is_alone = role == "teacher" and not result.get("members")  # others of an ensemble may know better
    tail = "; its soft targets said nothing of the classes" if is_alone else ""
    if epochs is None:
        return tail
    return f", after {counted(epochs, 'epoch')} of training{tail}"


def parity_caveats(parity: Mapping[str, Any]) -> Iterator[str]:
    """Yield why the file is not proven to be the student, and what weakens the proof.

    Args:
        parity: Content of ``parity.json``; empty if there is none.
    """
    if parity and not parity.get("passed"):
        faults = parity.get("faults") or ["see parity.json"]
        yield f"parity FAILED, so the file is not the student: {'; '.join(faults)}"
    yield from parity.get("notes", ())


def float_layers(exported: Mapping[str, Any]) -> Iterator[str]:
    """Yield a caveat if layers run in float.

    Args:
        exported: What ``export.json`` says about the student's file.
    """
    if falls := exported.get("fall_backs"):
        yield f"{len(falls)} layer{'s' * (len(falls) > 1)} left in float: {_some(falls)}"


def latency_caveats(bench: Mapping[str, Any], exported: Mapping[str, Any], float_model: str | None) -> Iterator[str]:
    """Yield on which devices the student is slower than its float twin or static int8, and why, if known.

    Args:
        bench: Content of a device's file.
        exported: What ``export.json`` says about the student's file.
        float_model: Name of the float twin among the models; None if there is none.
    """
    rows = bench.get("models", {})
    ours = rows.get("student", {}).get("median_ms")
    for name, words in ((float_model, "its float twin"), (BASELINE, "the static int8 file of the float net")):
        theirs = rows.get(name or "", {}).get("median_ms")
        if not ours or not theirs or ours <= SLOWER * theirs:
            continue
        reasons = list(_reasons(bench, rows["student"], rows[name or ""], exported, is_float=name == float_model))
        why = f" ({'; '.join(reasons)})" if reasons else ""
        device, faster = bench.get("device", "a device"), _under_low_bit(rows, theirs)
        times = f"{ours / theirs:.2f} times its median latency{why}{faster}"
        yield f"on {device} the student is slower than {words}: {times}"


def left_out_caveats(records: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """Yield a caveat if latencies are left out.

    Args:
        records: Those of devices that measured files of an earlier export.
        folder: The run folder.
    """
    if records:
        names, again = ", ".join(str(one["device"]) for one in records), shlex.quote(str(folder))
        yield (
            f"latencies of {names} belong to an earlier export's files and are left out; `qkd bench {again}` measures "
            f"again, or `qkd run {again} --until bench` as the run's config says"
        )


def _under_low_bit(rows: Mapping[str, Mapping[str, Any]], theirs: float) -> str:
    """Return the student's time under the low-bit provider, if that was measured."""
    median = rows.get(f"student, {LOW_BIT}", {}).get("median_ms")
    return f"; with the {LOW_BIT} {median / theirs:.2f} times" if median else ""


def _reasons(
    bench: Mapping[str, Any], ours: Mapping[str, Any], theirs: Mapping[str, Any], exported: Mapping[str, Any],
    *, is_float: bool,
) -> Iterator[str]:  # fmt: skip
    if falls := exported.get("fall_backs"):
        yield f"layers left in float: {_some([fall.partition(' ')[0] for fall in falls])}"
    flags = bench.get("machine", {}).get("cpu_flags")
    if is_float and flags is not None and not set(flags) & set(DOT_PRODUCT):
        yield "this processor has no int8 dot product"
    if (ours.get("p10_ms") or math.inf) <= (theirs.get("p90_ms") or 0.0):
        yield "their p10..p90 overlap"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return "; ".join(items[:NAMED]) + more
