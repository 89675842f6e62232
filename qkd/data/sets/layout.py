"""The parts of an image folder: train and test, train and val, or only class folders, which are split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qkd.data.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

VALIDATION = ("val", "valid", "validation")  # accepted names
PARTS = ("train", "test", *VALIDATION)


@dataclass(frozen=True)
class Layout:
    """The folders of a set; each holds one folder per class.

    Args:
        train: Images to train on; all images if the set has no parts.
        test: Images to score on; None for a share of ``train``.
        val: Images for model selection; None for a share of the rest of ``train``.
    """

    train: Path
    test: Path | None = None
    val: Path | None = None


# Names that other programs give the parts, in any case -> what they are called here.
NEAR = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation"), "test"),
    **dict.fromkeys((*VALIDATION, "dev", "development"), "val"),
}


def layout_of(folder: Path, is_hidden: Callable[[str], bool]) -> Layout:
    """Find the parts of a folder.

    ``train`` and ``test``, with or without ``val`` (``valid``, ``validation``), are used as named. With only ``train``
    and ``val``, the latter is the test part. With only ``train``, or class folders, the test part is a share of it.

    Args:
        folder: Folder of the set.
        is_hidden: Returns whether a name does not belong to the set.

    Raises:
        DataError: If it is not a folder, has images outside class folders, or lacks some of the parts.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; needs train/<class>/*.png|jpg|... and test/<class>/... next to it")
    names = {child.name for child in folder.iterdir() if child.is_dir() and not is_hidden(child.name)}
    val = next((name for name in VALIDATION if name in names), None)
    _refuse_near_names(folder, names, {"train", "test", val})
    if "train" not in names:
        found = sorted(names & set(PARTS))
        if found and names <= set(PARTS):
            raise DataError(
                f"{folder / 'train'}: no such folder; needs train/<class>/*.png|jpg|..., or only class folders, but "
                f"{folder} has {', '.join(found)}"
            )
        return Layout(folder)
    if "test" in names:
        return Layout(folder / "train", folder / "test", None if val is None else folder / val)
    return Layout(folder / "train", None if val is None else folder / val)


def _refuse_near_names(folder: Path, names: Collection[str], used: Collection[str | None]) -> None:
    """Raise if folders are named like parts, but not so that they are used: they would be classes, or be ignored.

    Raises:
        DataError: If so.
    """
    near = {name: NEAR[name.lower()] for name in sorted(names) if name.lower() in NEAR and name not in used}
    is_set = "train" in names or (len(near) == len(names) and "train" in near.values())
    if near and is_set:
        name, part = next(iter(near.items()))
        raise DataError(
            f"{folder / name}: is named like a part of the set, but would not be used as one; rename it to {part}, or "
            "move it out of the folder"
        )
