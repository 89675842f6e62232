"""Accuracy by class, and which classes are confused, from the files of the export stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qkd.units import percent

MOST_CLASSES = 20  # for a page with a matrix; with more, it shows the pairs that are confused most often
MOST_PAIRS = 10
CLASS_HEAD = ["class", "test images", "student", "teacher", "most often mistaken for"]
PAIR_HEAD = ["shows", "taken for", "images"]


@dataclass(frozen=True)
class Cell:
    """A cell of a confusion matrix.

    Args:
        images: Number of images.
        share: Share of its row, 0..1.
        is_right: Whether it is on the diagonal.
    """

    images: int
    share: float
    is_right: bool


def class_table(predictions: Mapping[str, Any], teacher: str = "teacher") -> list[list[str]]:
    """Return the heading and one line per class, worst first; only the heading if nothing is known.

    Args:
        predictions: Content of ``predictions.json``.
        teacher: Role of the teacher whose file it is about.
    """
    head = [teacher if cell == "teacher" else cell for cell in CLASS_HEAD]
    if not predictions:
        return [head]
    ours, theirs = (_counts(predictions, name) for name in ("student", "teacher"))
    names, rows = predictions["classes"], []
    for label, name in enumerate(names):
        total = sum(count for (shown, _), count in ours.items() if shown == label)
        if not total:
            continue
        shares = [counts[label, label] / total if counts else None for counts in (ours, theirs)]
        wrong = [(count, found) for (shown, found), count in ours.items() if shown == label != found]
        most = max(wrong, key=lambda pair: (pair[0], -pair[1]), default=None)
        taken = "-" if most is None else f"{class_name(names, most[1])} ({most[0]})"
        rows.append((shares[0], label, [name, f"{total:,}", percent(shares[0]), percent(shares[1]), taken]))
    return [head, *(cells for _, _, cells in sorted(rows, key=lambda row: (row[0] or 0.0, row[1])))]


def confusion_matrix(predictions: Mapping[str, Any]) -> list[tuple[str, list[Cell]]]:
    """Return one row per class: its name, and a cell for each predicted class; empty if there are too many."""
    names = predictions.get("classes", [])
    if not names or len(names) > MOST_CLASSES:
        return []
    counts = _counts(predictions, "student")
    rows = []
    for label, name in enumerate(names):
        row = [counts[label, found] for found in range(len(names))]
        total = sum(row) or 1
        rows.append((name, [Cell(count, count / total, found == label) for found, count in enumerate(row)]))
    return rows


def pair_table(predictions: Mapping[str, Any]) -> list[list[str]]:
    """Return the heading and the pairs of classes that the student confuses most often."""
    names = predictions.get("classes", [])
    pairs = [
        (count, label, found) for (label, found), count in _counts(predictions, "student").items() if label != found
    ]
    worst = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:MOST_PAIRS]
    return [PAIR_HEAD, *([class_name(names, label), class_name(names, found), f"{count:,}"]
                         for count, label, found in worst)]  # fmt: skip


def _counts(predictions: Mapping[str, Any], name: str) -> Counter[tuple[int, int]]:
    rows: Sequence[Sequence[int]] = predictions.get("models", {}).get(name, {}).get("confusion", ())
    return Counter({(label, found): count for label, found, count in rows})


def class_name(names: Sequence[str], label: int) -> str:
    """Return the name of a class, or its number if it has none."""
    return names[label] if 0 <= label < len(names) else str(label)
