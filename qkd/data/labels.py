"""Checks of class numbers and names: every class has images, and the number of classes is plausible."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkd.data.errors import DataError

MOST_CLASSES = 100_000  # up to here, named classes may outnumber the images: ImageNet-21k has 21,841
_LISTED = 10


def listed(items: Sequence[Any]) -> str:
    """Format items as a list for a message; only the first ten are shown.

    Example:
        >>> listed([3, 5])
        '[3, 5]'
    """
    more = f", and {len(items) - _LISTED:,} more" if len(items) > _LISTED else ""
    return f"{list(items[:_LISTED])!r}"[:-1] + f"{more}]"


def count_classes(labels: Tensor, source: Path) -> int:
    """Return the number of classes of numbered labels: the highest label plus one.

    Args:
        labels: Of the training images, int64, shape ``[n]``, not empty.
        source: Their file, for messages.

    Raises:
        DataError: If a class below the highest has no training image: labels start at 1, or are IDs from another list.
    """
    present: list[int] = torch.unique(labels).tolist()
    low, high = present[0], present[-1]
    count = max(high + 1, 1)
    if low < 0 or len(present) == count:
        return count  # negative labels are reported by the range check
    lacking = count - len(present)
    is_shifted = len(present) == high - low + 1
    way = f"subtract {low} from the labels of train and test" if is_shifted else "number the classes 0, 1, 2, ..."
    raise DataError(
        f"{source}: labels are {low}..{high}, but {lacking:,} of the {count:,} classes ({_first_lacking(present)}) "
        f"have no image among {len(labels):,}; {way}, or name all classes in classes.json"
    )


def require_names(names: Sequence[str], source: Path, *, images: int) -> tuple[str, ...]:
    """Check class names and return them as a tuple.

    Args:
        names: One name per class.
        source: Their file or folder, for messages.
        images: Number of training images.

    Raises:
        DataError: If a name occurs twice or is not printable text, or there are far more classes than images.
    """
    if len(names) > max(MOST_CLASSES, images):
        raise DataError(f"{source}: {len(names):,} classes for {images:,} training images; name only those that occur")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) <= 1000 else []
        raise DataError(f"{source}: class names must be unique, found twice: {listed(twice) if twice else 'some'}")
    bad = [name for name in names if not name.isprintable()]
    if bad:
        raise DataError(f"{source}: class names must be printable text, found {listed(bad)}; rename them")
    return tuple(names)


def class_notes(train: Tensor, test: Tensor, classes: Sequence[str]) -> list[str]:
    """Return one line for each part in which some classes have no image: allowed, but seldom intended.

    Args:
        train: Labels of the training images, int64, shape ``[n]``.
        test: Labels of the test images.
        classes: Names.
    """
    lines = []
    for part, labels, one, many in (
        ("training", train, "its output is never trained", "their outputs are never trained"),
        ("test", test, "the test accuracy does not cover it", "the test accuracy does not cover them"),
    ):
        counts = torch.bincount(labels, minlength=len(classes))
        empty = [classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
        if empty:
            names = ", ".join(empty[:_LISTED]) + (f" and {len(empty) - _LISTED:,} more" if len(empty) > _LISTED else "")
            has, them = ("has", one) if len(empty) == 1 else ("have", many)
            lines.append(f"{len(empty):,} of {len(classes):,} classes {has} no {part} image ({names}): {them}")
    return lines


def _first_lacking(present: Iterable[int]) -> str:
    """Return the first classes, counted from 0, that are missing from an ascending list, for a message."""

    def gaps() -> Iterable[int]:
        expected = 0
        for label in present:
            yield from range(expected, label)
            expected = label + 1

    found = list(islice(gaps(), _LISTED + 1))
    return ", ".join(map(str, found[:_LISTED])) + (", ..." if len(found) > _LISTED else "")
