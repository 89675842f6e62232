"""The parts of an image folder: train and test, train and val, or only class folders, which are split."""

from __future__ import annotations

import re
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
_UNLABELED = ("pred", "prediction", "predictions", "unlabeled")  # a part without classes, as in seg_pred/
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")  # in train_set, seg-test, TrainingSet, val2017


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
    _refuse_near_names(folder, names, {"train", "test", val}, is_hidden)
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


def _refuse_near_names(
    folder: Path, names: Collection[str], used: Collection[str | None], is_hidden: Callable[[str], bool]
) -> None:
    """Raise if folders are named like parts, but not so that they are used: they would be classes, or be ignored.

    Raises:
        DataError: If so.
    """
    near = {name: NEAR[name.lower()] for name in sorted(names) if name.lower() in NEAR and name not in used}
    if "train" not in names:
        parts = {name: _part_in(name) for name in sorted(names)}
        is_whole = "train" in parts.values() and bool({"test", "val"} & {*parts.values()})
        is_whole = is_whole and all(_has_folders(folder / name, is_hidden) for name, part in parts.items() if part)
        if is_whole and None not in parts.values():  # each is named like a part, and holds classes: it is no class
            near = {name: part for name, part in parts.items() if part and name != part and name not in VALIDATION}
        elif len(near) < len(names) or "train" not in near.values():
            return
    if near:
        name, part = next(iter(near.items()))
        raise DataError(
            f"{folder / name}: is named like a part of the set, but would not be used as one; rename it to {part}, or "
            "move it out of the folder"
        )


def _has_folders(folder: Path, is_hidden: Callable[[str], bool]) -> bool:
    return any(child.is_dir() and not is_hidden(child.name) for child in folder.iterdir())


def _part_in(name: str) -> str | None:
    """Return the part that a name has as a word in it; empty for one without labels, None if it may be a class."""
    words = [name.lower(), *(word.lower() for word in _WORD.findall(name))]
    part = next((NEAR[word] for word in words if word in NEAR), None)
    return "" if part is None and any(word in _UNLABELED for word in words) else part
