"""Which parts a folder of images has: train and test, train and val, or class folders alone, which are divided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qkd.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

VALIDATION = ("val", "valid", "validation")  # names that people give it
PARTS = ("train", "test", *VALIDATION)


@dataclass(frozen=True)
class Layout:
    """The folders of a set; each holds a folder a class.

    Args:
        train: Images to learn from; of a set without parts, all of them.
        test: Images to score on; None: a share of ``train``.
        val: Images to choose by; None: a share of what is left of ``train``.
    """

    train: Path
    test: Path | None = None
    val: Path | None = None


def layout_of(folder: Path, is_hidden: Callable[[str], bool]) -> Layout:
    """Return which parts a folder has.

    ``train`` and ``test``, with or without ``val`` (``valid``, ``validation``): as they are called. ``train`` and
    ``val`` alone: the latter is what is scored in the end. ``train`` alone, or class folders: test images are a share.

    Args:
        folder: Of the set.
        is_hidden: Tells names that are not the set's own.

    Raises:
        DataError: If it is no folder, has images outside class folders, or parts of which some are missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; needs train/<class>/*.png|jpg|... and test/<class>/... beside it")
    names = {child.name for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name)}
    val = next((name for name in VALIDATION if name in names), None)
    if "train" not in names:
        found = sorted(names & set(PARTS))
        if found and names <= set(PARTS):
            raise DataError(
                f"{folder / 'train'}: no such folder; needs train/<class>/*.png|jpg|..., or class folders alone, but "
                f"{folder} has {', '.join(found)}"
            )
        return Layout(folder)
    if "test" in names:
        return Layout(folder / "train", folder / "test", None if val is None else folder / val)
    return Layout(folder / "train", None if val is None else folder / val)
