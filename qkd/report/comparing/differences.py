"""Compare runs with the first one: accuracy, size and latency, and which differences are noise."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.sample import read_sample
from qkd.report.caveats import SLOWER
from qkd.report.findings.verdict import is_of
from qkd.report.intervals import paired_difference, unpack_answers, unpaired_interval
from qkd.report.summary import ModelRow, RunSummary
from qkd.units import megabytes, milliseconds, percent

HEAD = ["run", "figure", "first run", "this run", "difference", "95 % interval", "this run is"]
NOISE, OTHER_IMAGES, SAME_SIZE = "within noise", "not comparable: other test images", "the same size"
UNLIKE = "not comparable"
UNKNOWN_IMAGES = "unknown: no record of the test images"
OTHER_SCORES = "not comparable: other statistics in batch norm (data.batch_statistics)"
SIZE_NOISE = 0.01  # names and versions in a file's metadata differ by less
SAME_MACHINE = ("cpu", "onnxruntime")  # keys of a machine's record
SAME_SETTINGS = ("threads", "batch_size", "affinity")
WORDS = {"cpu": "processor", "batch_size": "batch", "affinity": "pinned to CPUs"}
STUDENT = "student"  # a measured model's name is this, or begins with it: `student, low-bit provider`


@dataclass(frozen=True)
class Difference:
    """A figure of a run next to that of the first run.

    Args:
        run: The run's name.
        against: The first run's name.
        position: Position of the run among all compared runs, from 0.
        figure: ``accuracy``, ``file``, ``latency, DEVICE[, PROVIDER]``, or ``latency`` if no device measured both.
        first, this: Both values: fractions of the test images, bytes or milliseconds.
        verdict: ``better``, ``worse``, ``smaller``, ``larger``, ``faster``, ``slower``, ``the same size``, ``within
            noise``, or why the two cannot be compared.
        difference: For accuracies, this minus first; for sizes and latencies, this divided by first.
        interval: 95 % interval of the difference of accuracies; None if there is none.
        is_paired: Whether the interval compares the answers image by image.
    """

    run: str
    against: str
    position: int
    figure: str
    first: float
    this: float
    verdict: str
    difference: float | None = None
    interval: tuple[float, float] | None = None
    is_paired: bool = False


def differences(summaries: Sequence[RunSummary | None]) -> tuple[Difference, ...]:
    """Return the differences of runs from the first one that has a student.

    Args:
        summaries: Those of the runs; None for a run that cannot be read.
    """
    known = [
        _Student(position, summary, summary.student)
        for position, summary in enumerate(summaries)
        if summary is not None and summary.student is not None
    ]
    return tuple(one for this in known[1:] for one in _of_pair(known[0], this))


def difference_cells(found: Sequence[Difference]) -> list[list[str]]:
    """Return the heading and one line per difference, as text."""
    return [HEAD, *(_cells(one) for one in found)]


def difference_notes(found: Sequence[Difference], folders: Sequence[Path]) -> list[str]:
    """Return notes on the differences, and on how to get missing ones.

    Args:
        found: The differences.
        folders: The run folders.
    """
    notes = []
    if unpaired := list(dict.fromkeys(one.run for one in found if one.interval and not one.is_paired)):
        notes.append(
            f"accuracy of {', '.join(unpaired)}: not compared image by image, which would give a narrower interval; "
            f"`qkd export RUN`, for each of the runs, records what that needs (a federated run has none)"
        )
    if found and not any("provider" in one.figure for one in found):
        apart = list(dict.fromkeys(str(folder) for folder in folders))
        if _same_samples(folders):
            how = f"`qkd bench {shlex.join(apart)}` measures the files interleaved"
        else:  # `qkd bench` refuses them together
            how = f"`qkd bench {shlex.quote(apart[0])}`, for each of the runs, measures the files"
        notes.append(
            f"{how}, also with the low-bit provider where it has kernels for them; add `--on ssh://HOST` for another "
            f"device"
        )
    return notes


def _same_samples(folders: Sequence[Path]) -> bool:
    """Return whether all runs have the same images, prepared alike, to measure with."""
    digests = set()
    for folder in folders:
        file = folder / "export" / "sample.npz"
        try:
            digests |= {hashlib.sha256(read_sample(file).images.tobytes()).digest()} if file.is_file() else set()
        except (OSError, ValueError):  # measuring will say what is wrong
            continue
    return len(digests) < 2


@dataclass(frozen=True)
class _Student:
    """A run that has a student."""

    position: int
    summary: RunSummary
    row: ModelRow


def _of_pair(first: _Student, this: _Student) -> Iterator[Difference]:
    say = partial(Difference, this.summary.name, first.summary.name, this.position)
    theirs, ours = first.row.test_accuracy, this.row.test_accuracy
    if theirs is not None and ours is not None:
        yield say("accuracy", theirs, ours, **_of_accuracy(first, this, theirs, ours))
    if first.row.size_bytes and this.row.size_bytes:
        ratio = this.row.size_bytes / first.row.size_bytes
        verdict = SAME_SIZE if abs(ratio - 1) <= SIZE_NOISE else "smaller" if ratio < 1 else "larger"
        yield say("file", first.row.size_bytes, this.row.size_bytes, verdict, ratio)
    measured = list(_measured_on_both(first.summary, this.summary))
    for figure, one, other, unlike in measured:
        found = (f"{UNLIKE}: {unlike}",) if unlike else _of_medians(one, other)
        yield say(figure, one["median_ms"], other["median_ms"], *found)
    if not measured and first.row.median_ms and this.row.median_ms:
        benches = first.summary.bench, this.summary.bench
        devices = " and ".join(str(bench.get("device")) for bench in benches)
        unlike = "; ".join(filter(None, [f"device {devices}", _unlike(*benches, of_machine=False)]))
        yield say("latency", first.row.median_ms, this.row.median_ms, f"{UNLIKE}: {unlike}")


def _of_accuracy(first: _Student, this: _Student, theirs: float, ours: float) -> dict[str, Any]:
    counts = this.summary.test_images, first.summary.test_images
    sets = [one.summary.test_set for one in (first, this)]
    if counts[0] is None or counts[1] is None:
        return {"verdict": "unknown: no number of test images", "difference": ours - theirs}
    batches = [one.summary.batch_statistics for one in (first, this)]
    if batches[0] != batches[1]:
        return {"verdict": OTHER_SCORES}
    if not all(sets):
        return {"verdict": UNKNOWN_IMAGES, "difference": ours - theirs}
    # runs of before say how many test images there are, not how many of them fill batches
    if sets[0] != sets[1] or (counts[0] != counts[1] and not batches[0]):
        return {"verdict": OTHER_IMAGES}
    # the exported files' answers, which use the running statistics
    answers = [None if batches[0] else _answers(one.summary) for one in (this, first)]
    paired = None if answers[0] is None or answers[1] is None else paired_difference(answers[0], answers[1])
    if paired is not None and is_of(paired["value"], ours - theirs, counts[0]):
        value, interval, is_paired = paired["value"], (paired["low"], paired["high"]), True
    else:
        value, interval, is_paired = ours - theirs, unpaired_interval(ours, theirs, (counts[0], counts[1])), False
    verdict = "better" if interval[0] > 0 else "worse" if interval[1] < 0 else NOISE
    return {"verdict": verdict, "difference": value, "interval": interval, "is_paired": is_paired}


def _answers(summary: RunSummary) -> npt.NDArray[np.bool_] | None:
    said: Mapping[str, Any] = summary.predictions.get("models", {}).get(STUDENT, {})
    return unpack_answers(said["correct"], summary.predictions["images"]) if said.get("correct") else None


def _measured_on_both(
    first: RunSummary, this: RunSummary
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any], str]]:
    """Yield the students' measurements on devices of both runs, and in what the conditions differ."""
    measured = {bench.get("device"): bench for bench in first.devices}
    for bench in this.devices:
        other = measured.get(bench.get("device"), {})
        for name, ours in bench.get("models", {}).items():
            theirs = other.get("models", {}).get(name, {})
            if name.partition(",")[0] == STUDENT and theirs.get("median_ms") and ours.get("median_ms"):
                yield f"latency, {bench['device']}{name.removeprefix(STUDENT)}", theirs, ours, _unlike(other, bench)


def _unlike(first: Mapping[str, Any], this: Mapping[str, Any], *, of_machine: bool = True) -> str:
    """Return in what the conditions of two measurements differ: ``batch 1 and 64``; empty if in nothing."""
    machines = first.get("machine") or {}, this.get("machine") or {}
    pairs = {key: (machines[0].get(key), machines[1].get(key)) for key in SAME_MACHINE if of_machine}
    pairs |= {key: (first.get(key) or None, this.get(key) or None) for key in SAME_SETTINGS}
    return "; ".join(
        f"{WORDS.get(key, key)} {_value(key, then)} and {_value(key, now)}"
        for key, (then, now) in pairs.items()
        if then != now
    )


def _value(key: str, value: Any) -> str:
    if value is None:
        return "none" if key == "affinity" else "unknown"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _of_medians(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> tuple[str, float]:
    """Return the verdict and ratio of two medians; noise if p10..p90 overlap or the medians hardly differ."""
    ratio = ours["median_ms"] / theirs["median_ms"]
    low, high = (theirs, ours) if ratio > 1 else (ours, theirs)
    overlap = (high.get("p10_ms") or math.inf) <= (low.get("p90_ms") or 0.0)
    noise = overlap or max(ratio, 1 / ratio) <= SLOWER
    return NOISE if noise else "faster" if ratio < 1 else "slower", ratio


def _cells(one: Difference) -> list[str]:
    apart, interval = "-", "-"
    if one.difference is not None:
        apart = f"{100 * one.difference:+.1f} points" if one.figure == "accuracy" else f"x {one.difference:.2f}"
    if one.interval is not None:
        interval = f"{100 * one.interval[0]:+.1f} .. {100 * one.interval[1]:+.1f} points"
    return [one.run, one.figure, _shown(one.figure, one.first), _shown(one.figure, one.this), apart, interval,
            one.verdict]  # fmt: skip


def _shown(figure: str, value: float) -> str:
    if figure == "file":
        return megabytes(int(value))
    return percent(value) if figure == "accuracy" else milliseconds(value)
