"""A data set kept as two NumPy archives, ``train.npz`` and ``test.npz``, checked before anything is trained on it."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qkd.data.errors import DataError
from qkd.data.splits import MemorySplit

_WANTED = "`images` uint8 [n, height, width] or [n, height, width, channels] and `labels` integers [n]"


def load_npz_splits(folder: Path) -> tuple[MemorySplit, MemorySplit, tuple[str, ...]]:
    """Return ``(train, test, classes)`` from ``train.npz``, ``test.npz`` and, if there is one, ``classes.json``.

    Args:
        folder: Holds the archives. Each has ``images`` (uint8, ``[n, height, width]`` or ``[n, height, width, 1 or
            3]``) and ``labels`` (integers, ``[n]``, from 0). ``classes.json`` is a list of names; without it classes
            are numbered.

    Raises:
        DataError: If a file or array is missing, damaged, pickled, of the wrong type, shape or count, or if a label is
            out of range or is tested but never trained.
    """
    train = _read_archive(folder / "train.npz")
    test = _read_archive(folder / "test.npz")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{folder}: images of train.npz are {_shape(train)} and those of test.npz {_shape(test)}; both must agree"
        )
    classes = _class_names(folder / "classes.json", train)
    for part, split in (("train", train), ("test", test)):
        _check_range(folder / f"{part}.npz", split, classes)
    untrained = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if untrained:
        raise DataError(
            f"{folder}: classes {untrained[:10]} are in test.npz but not in train.npz: nothing could learn them"
        )
    return train, test, classes


def _read_archive(path: Path) -> MemorySplit:
    images, labels = _read_arrays(path)
    _check_images(path, images)
    _check_labels(path, labels, len(images))
    channels_first = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
    return MemorySplit(
        torch.from_numpy(np.ascontiguousarray(channels_first)), torch.from_numpy(labels.astype(np.int64, copy=True))
    )


def _read_arrays(path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; needs train.npz and test.npz in that folder, each with {_WANTED}")
    try:
        # Opened here, not by numpy, which leaves the file open when the archive is damaged.
        with open(path, "rb") as file:
            _check_kind(path, file.read(4))
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                return _take(path, archive)
    except DataError:
        raise
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"{path}: holds pickled objects, which are never opened; save {_WANTED} with numpy.savez"
            ) from error
        raise DataError(f"{path}: damaged or no NumPy archive ({error}); write it again with numpy.savez") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError) as error:
        raise DataError(f"{path}: damaged or no NumPy archive ({error}); write it again with numpy.savez") from error


def _check_kind(path: Path, start: bytes) -> None:
    if start[:1] == b"\x80":  # how a pickle begins
        raise DataError(f"{path}: is a pickle, which is never opened; save {_WANTED} with numpy.savez")
    if start != b"PK\x03\x04":  # how a zip file begins
        raise DataError(f"{path}: damaged or no NumPy archive; write it again with numpy.savez")


def _take(path: Path, archive: Mapping[str, npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    missing = [name for name in ("images", "labels") if name not in archive]
    if missing:
        raise DataError(f"{path}: array {' and '.join(missing)} missing, found {list(archive)}; needs {_WANTED}")
    return archive["images"], archive["labels"]


def _check_images(path: Path, images: npt.NDArray[Any]) -> None:
    if images.dtype != np.uint8:
        found = f"{images.dtype}"
        if np.issubdtype(images.dtype, np.floating):
            bad = int((~np.isfinite(images)).sum())
            found += f" ({bad} of its values are NaN or infinite)" if bad else ""
        raise DataError(f"{path}: `images` must be uint8 (0..255), found {found}; scale, round and convert them")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise DataError(
            f"{path}: `images` must be [n, height, width] or [n, height, width, 1 or 3] (channels last), "
            f"found {list(images.shape)}"
        )
    if 0 in images.shape:
        raise DataError(f"{path}: `images` is empty, found shape {list(images.shape)}")
    if images.shape[1] != images.shape[2]:
        raise DataError(f"{path}: images must be square, found {images.shape[1]}x{images.shape[2]}; crop or pad them")


def _check_labels(path: Path, labels: npt.NDArray[Any], count: int) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: `labels` must be integers, found {labels.dtype}")
    if labels.shape != (count,):
        raise DataError(f"{path}: needs one label an image, found labels {list(labels.shape)} for {count} images")


def _check_range(path: Path, split: MemorySplit, classes: tuple[str, ...]) -> None:
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= len(classes):
        raise DataError(
            f"{path}: labels must be 0..{len(classes) - 1} ({len(classes)} classes), found {low}..{high}; "
            "number the classes from 0, or correct classes.json"
        )


def _class_names(path: Path, train: MemorySplit) -> tuple[str, ...]:
    if not path.exists():
        return tuple(str(label) for label in range(max(int(train.labels.max()) + 1, 1)))
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); needs a list of class names") from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: needs a list of class names (strings), found {type(names).__name__}")
    if len(set(names)) != len(names):
        raise DataError(f"{path}: class names must differ, found {names}")
    return tuple(names)


def _shape(split: MemorySplit) -> str:
    channels, height, width = split.images.shape[1:]
    return f"{height}x{width}x{channels}"
