"""A data set in two NumPy archives, ``train.npz`` and ``test.npz``, checked before anything is trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.labels import count_classes, listed, require_names
from qkd.data.sets.archive import IN_MEMORY_BYTES, Archive, ArrayHeader, open_archive
from qkd.data.sets.rows import ArraySplit, HeldRows, channels_first
from qkd.data.splits import MemorySplit, Parts
from qkd.files import parse_json
from qkd.foreign import UnreadableFileError, read_text

ARCHIVES = ("train.npz", "test.npz")
_WANTED = "`images` uint8 [n, height, width] or [n, height, width, channels] and `labels` integers [n]"
_LARGEST_NAMES = 1 << 26  # bytes of classes.json; a million names take half of that


def load_npz_splits(folder: Path) -> Parts:
    """Load the parts of a data set from ``train.npz``, ``test.npz`` and, if there is one, ``classes.json``.

    Uncompressed images of more than 64 MiB stay in their file, and each batch reads its own.

    Args:
        folder: Folder of the archives. Each has ``images`` (uint8, ``[n, height, width]`` or ``[n, height, width, 1 or
            3]``) and ``labels`` (integers, ``[n]``, from 0). ``classes.json`` is a list of names; without it, classes
            are numbered, and each of them needs a training image.

    Returns:
        Both parts, and the classes by name or number.

    Raises:
        DataError: If a file or array is missing, damaged, encrypted, pickled, or of the wrong type, shape or count, or
            if a label is out of range or is tested but never trained.
        OSError: If ``classes.json`` cannot be read.
    """
    train = _read_archive(folder / "train.npz")
    test = _read_archive(folder / "test.npz")
    sizes = [_size(part) for part in (train, test)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"{folder}: images of train.npz are {sizes[0]}, but those of test.npz are {sizes[1]}; they must match"
        )
    classes = _class_names(folder / "classes.json", folder / "train.npz", train.labels)
    for name, part in (("train", train), ("test", test)):
        _check_range(folder / f"{name}.npz", part.labels, len(classes))
    untrained = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if untrained:
        raise DataError(
            f"{folder}: classes {listed(untrained)} are in test.npz but not in train.npz, so they cannot be learned"
        )
    others = sorted(path.name for path in folder.glob("*.npz") if path.name not in ARCHIVES)
    notes = (f"{listed(others)} beside train.npz and test.npz not read",) if others else ()
    return Parts(train, test, classes, notes)


def _read_archive(path: Path) -> MemorySplit | ArraySplit:
    with open_archive(path, _WANTED) as archive:
        missing = [name for name in ("images", "labels") if name not in archive.names]
        if missing:
            found = listed(archive.names)
            raise DataError(f"{path}: missing array {' and '.join(missing)}, found {found}; needs {_WANTED}")
        images, labels = archive.header("images"), archive.header("labels")
        _check_images(archive, images)
        _check_labels(path, labels, images.shape[0])
        classes = _as_classes(path, archive.read(labels))
        rows = archive.rows(images)
    if isinstance(rows, HeldRows) and images.nbytes <= IN_MEMORY_BYTES:
        everything = rows.take(np.arange(rows.shape[0]))
        return MemorySplit(torch.from_numpy(channels_first(everything)), classes)
    return ArraySplit(rows, classes)


def _check_images(archive: Archive, images: ArrayHeader) -> None:
    path, shape = archive.path, images.shape
    if images.dtype != np.uint8:
        found = f"{images.dtype}{_not_finite(archive, images)}"
        raise DataError(f"{path}: `images` must be uint8 (0..255), found {found}; scale, round, and convert them")
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise DataError(
            f"{path}: `images` must be [n, height, width] or [n, height, width, 1 or 3] (channels last), "
            f"found {list(shape)}"
        )
    if 0 in shape:
        raise DataError(f"{path}: `images` is empty, found shape {list(shape)}")


def _not_finite(archive: Archive, images: ArrayHeader) -> str:
    """Return the number of NaN or infinite values, as text for a message; only small arrays are read for this."""
    if not np.issubdtype(images.dtype, np.floating) or images.nbytes > IN_MEMORY_BYTES:
        return ""
    bad = int((~np.isfinite(archive.read(images))).sum())
    return f" ({bad} of its values are NaN or infinite)" if bad else ""


def _check_labels(path: Path, labels: ArrayHeader, count: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f'{path}: `labels` must be integers, found {labels.dtype}; convert class numbers with .astype("int64")'
        )
    if labels.shape != (count,):
        one_hot = len(labels.shape) == 2 and labels.shape[1] > 1
        hint = "; convert one-hot rows with labels.argmax(1)" if one_hot else ""
        raise DataError(f"{path}: needs one label per image, found {list(labels.shape)} for {count} images{hint}")


def _as_classes(path: Path, labels: npt.NDArray[Any]) -> Tensor:
    highest = int(labels.max())
    if highest > np.iinfo(np.int64).max:
        raise DataError(f"{path}: labels must be class numbers from 0, found {highest}")
    return torch.from_numpy(labels.astype(np.int64, copy=True))


def _check_range(path: Path, labels: Tensor, classes: int) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{path}: labels must be 0..{classes - 1} ({classes:,} classes), found {low}..{high}; "
            "number the classes from 0, or correct classes.json"
        )


def _class_names(path: Path, archive: Path, labels: Tensor) -> tuple[str, ...]:
    if not path.exists():
        return tuple(map(str, range(count_classes(labels, archive))))
    return read_class_names(path, images=len(labels))


def read_class_names(path: Path, *, images: int) -> tuple[str, ...]:
    """Return the names in a ``classes.json``.

    Args:
        path: The file.
        images: How many images they are for; bounds the number of names.

    Raises:
        DataError: If it does not hold a list of different names.
    """
    try:
        names = parse_json("the list", read_text(path, _LARGEST_NAMES))
    except (UnreadableFileError, IsADirectoryError) as error:
        fault = f"{path}: class names must be in a regular file of at most 64 MiB that holds a list of them"
        raise DataError(fault) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}); needs a list of class names") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: needs a list of class names (strings), found {type(names).__name__}")
    return require_names(names, path, images=images)


def _size(split: MemorySplit | ArraySplit) -> str:
    channels, height, width = split.image_shape
    return f"{height}x{width}x{channels}"
