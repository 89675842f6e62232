"""Sum up a run in one sentence: how much smaller, faster, and less accurate the student is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

MOST_APART, FEW_IMAGES = 0.005, 2.5  # a share of all, or this many: what images with two nearly equal logits may change
SAME = 0.02  # medians of two measurements of one file differ by up to about 2 %


class Figures(Protocol):
    """What is read from a model's row."""

    @property
    def role(self) -> str:
        """Its description in the run."""

    @property
    def size_bytes(self) -> int | None:
        """Size of its file."""

    @property
    def median_ms(self) -> float | None:
        """Median latency of one inference."""

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy on the test images, as a fraction."""


def verdict(student: Figures | None, twin: Figures | None, teacher: Figures | None, *, predictions: Mapping[str, Any],
            parity: Mapping[str, Any], under: Mapping[str, Figures] | None = None, where: str = "") -> str:  # fmt: skip
    """Return the sentence; empty if there is no student yet.

    Args:
        student: Its row.
        twin: The row of the same net in FP32; None if there is none.
        teacher: The row of what it learned from.
        predictions: Content of ``predictions.json``, for the spread of the difference; empty if there is none.
        parity: Content of ``parity.json``.
        under: The student's rows under other execution providers, by the provider's name.
        where: What the latencies must say of their device and batch; empty for one image on this machine.
    """
    if student is None or student.test_accuracy is None:
        return ""
    place = f" ({where})" if where else ""
    parts = [*_costs(student, twin, place), *(f"{text}{place}" for text in _speeds(under or {}, twin))]
    points = points_text(student.test_accuracy, teacher.test_accuracy if teacher else None, predictions)
    if points:
        parts.append(f"{points} vs. the {teacher.role.partition(' (')[0] if teacher else 'teacher'}")
    if not parts:
        return ""
    doubt = "; but the file is NOT proven to be the student" if parity and not parity.get("passed") else ""
    return f"{', '.join(parts)}{doubt}."


def points_text(ours: float, theirs: float | None, predictions: Mapping[str, Any]) -> str:
    """Return the difference of two accuracies in points, with its 95 % half-width if known.

    Args:
        ours: The student's.
        theirs: The other net's.
        predictions: Content of ``predictions.json``. Its difference is that of the exported files; a teacher that has
            none (an ensemble), or accuracies by batch statistics, differ by another one.
    """
    found = predictions.get("difference")
    if found and (theirs is None or is_of(found["value"], ours - theirs, predictions.get("images"))):
        return f"{_signed(found['value'])} ± {100 * found['half_width']:.1f} accuracy points"
    return "" if theirs is None else f"{_signed(ours - theirs)} accuracy points"


def is_of(value: float, difference: float, images: int | None) -> bool:
    """Return whether a difference of exported files is that of two accuracies, but for a few images.

    Args:
        value: From the files' answers, as a fraction.
        difference: Of the accuracies.
        images: Number of test images; None if unknown.
    """
    return abs(value - difference) <= max(MOST_APART, FEW_IMAGES / images if images else 0.0)


def factor_text(ours: float | None, theirs: float | None, words: tuple[str, str, str]) -> str:
    """Return the ratio of two figures in words; empty if one is missing.

    Args:
        ours: The student's figure.
        theirs: Its FP32 twin's figure.
        words: Words for less, more, and the same: ``("smaller", "larger", "as large")``.
    """
    if not ours or not theirs:
        return ""
    factor, (less, more, same) = theirs / ours, words
    if abs(factor - 1) <= SAME:
        return same
    return f"{_times(factor)} x {less}" if factor > 1 else f"{_times(1 / factor)} x {more}"


def _costs(student: Figures, twin: Figures | None, place: str) -> list[str]:
    """Return size and speed compared with the twin; the first of them names it, a speed its device."""
    if twin is None:
        return []
    pairs = (
        factor_text(student.size_bytes, twin.size_bytes, ("smaller", "larger", "as large")),
        factor_text(student.median_ms, twin.median_ms, ("faster", "slower", "as fast")),
    )
    parts = [text for text in pairs if text]
    if parts:
        parts[0] += f" {'as' if parts[0].startswith('as ') else 'than'} FP32"
    if pairs[1]:
        parts[-1] += place
    return parts


def _speeds(under: Mapping[str, Figures], twin: Figures | None) -> Iterator[str]:
    for provider, row in under.items():
        if text := factor_text(row.median_ms, twin.median_ms if twin else None, ("faster", "slower", "as fast")):
            yield f"{text} with the {provider}"


def _times(factor: float) -> str:
    return f"{factor:.2f}" if factor < 1.1 else f"{factor:.1f}"


def _signed(fraction: float) -> str:
    text = f"{100 * fraction:+.1f}"
    return "0.0" if float(text) == 0 else text
