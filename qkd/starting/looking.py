"""Look at a folder of images as `qkd init` does: how many, of which classes, how large, gray or color."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qkd.config import DataConfig
from qkd.data import DataError, load_splits
from qkd.data.sets import FolderSplit, list_folder
from qkd.data.sets.arrays import ARCHIVES
from qkd.data.sets.folder import is_hidden
from qkd.data.sets.images import IMAGE_SUFFIXES, read_headers
from qkd.image_size import ImageSize, image_size_of, size_text

LARGEST_NATIVE = 256  # pixels per side that are kept if all images have them; a net for more takes hours on a CPU
LARGEST_CHOSEN = 224  # pixels per side that other images are resized to at most
STEP = 32  # sides are multiples of it: five halvings leave whole pixels
_NAMED = 8  # classes that are listed by name


@dataclass(frozen=True)
class Look:
    """What a folder contains.

    Args:
        kind: The data set's name in a config: ``folder`` or ``npz``.
        images: Number of images in all parts.
        classes: Class -> number of images.
        channels: 1 (gray) or 3.
        smallest: Size of the smallest image, by area.
        largest: Size of the largest one.
        image_size: What to resize images to; None if all have one size that a net can take.
        train: Number of training images.
        held_out: What is held out from training, in one line.
        notes: What else the user should know, one line each.
    """

    kind: str
    images: int
    classes: dict[str, int]
    channels: int
    smallest: ImageSize
    largest: ImageSize
    image_size: ImageSize | None
    train: int
    held_out: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data."""
        sizes = {name: size_text(getattr(self, name)) for name in ("smallest", "largest")}
        return {
            "kind": self.kind, "images": self.images, "classes": self.classes, "channels": self.channels, **sizes,
            "image_size": self.image_size, "train": self.train, "held_out": self.held_out, "notes": list(self.notes),
        }  # fmt: skip

    @property
    def words(self) -> str:
        """What was found, in one line."""
        sizes = dict.fromkeys((size_text(self.smallest), size_text(self.largest)))
        color = "gray" if self.channels == 1 else "color"
        return f"{self.images:,} images of {len(self.classes):,} classes, {color}, {' to '.join(sizes)} pixels"

    def to_text(self) -> str:
        """Return what was found, as several lines."""
        counts = [f"{name} {count:,}" for name, count in list(self.classes.items())[:_NAMED]]
        more = len(self.classes) - len(counts)
        names = ", ".join(counts) + (f", and {more:,} more" if more else "")
        return "\n".join([self.words, f"classes: {names}", self.held_out, *self.notes])


def look_at(folder: Path) -> Look:
    """Return what a folder of images, or of ``train.npz`` and ``test.npz``, contains.

    Args:
        folder: Class folders, alone or in ``train``, ``test`` and ``val``; or the archives.

    Returns:
        What was found.

    Raises:
        ValueError: If there are no images, none in class folders, only one class, or an image that cannot be read (then
            a ``DataError``).
        OSError: If the folder cannot be read.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it needs class folders of images, or train.npz and test.npz")
    if all((folder / name).is_file() for name in ARCHIVES):
        return _look_at_archives(folder)
    _refuse_loose(folder)
    parts = list_folder(folder)
    if len(parts.classes) < 2:
        raise DataError(f"{folder} has only one class ({parts.classes[0]}); a classifier needs two or more folders")
    headers = read_headers(path for part in (parts.train, parts.test) for path in _files(part))
    sizes = Counter((header.height, header.width) for header in headers)
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    labels = torch.cat([parts.train.labels, parts.test.labels])
    counts = torch.bincount(labels, minlength=len(parts.classes)).tolist()
    half = (0.5, 0.5, 0.5)  # any value will do: with one, no image is decoded for its mean
    config = DataConfig(name="folder", path=folder, image_size=8, mean=half, std=half, channels=3)
    splits = load_splits(config, seed=0)
    return Look(
        "folder", len(headers), dict(zip(parts.classes, counts, strict=True)),
        1 if all(header.is_gray for header in headers) else 3,
        image_size_of(*by_area[0]), image_size_of(*by_area[-1]), _chosen_size(sizes), len(splits.train),
        splits.held_out, splits.notes,
    )  # fmt: skip


def _look_at_archives(folder: Path) -> Look:
    splits = load_splits(DataConfig(name="npz", path=folder), seed=0)
    labels = torch.cat([part.labels for part in (splits.train, splits.val, splits.test)])
    counts = torch.bincount(labels, minlength=len(splits.classes)).tolist()
    return Look(
        "npz", len(labels), dict(zip(splits.classes, counts, strict=True)), splits.channels, splits.image_size,
        splits.image_size, None, len(splits.train), splits.held_out, splits.notes,
    )  # fmt: skip


def _refuse_loose(folder: Path) -> None:
    """Raise if images are outside class folders: their class would be anybody's guess."""
    children = [child for child in sorted(folder.iterdir()) if not is_hidden(child.name)]
    loose = [child.name for child in children if child.suffix.lower() in IMAGE_SUFFIXES]
    if not any(child.is_dir() for child in children):
        found = f"{len(loose):,} images, but no class folders" if loose else "no class folders"
        raise DataError(f"{folder} has {found}; put the images of each class into a folder named after it")


def _files(part: Any) -> tuple[Path, ...]:
    return part.files if isinstance(part, FolderSplit) else ()


def _chosen_size(sizes: Counter[tuple[int, int]]) -> ImageSize | None:
    if len(sizes) == 1 and max(next(iter(sizes))) <= LARGEST_NATIVE:
        return None
    shorter = statistics.median(side for size, count in sizes.items() for side in [min(size)] * count)
    return max(STEP, min(LARGEST_CHOSEN, int(shorter) // STEP * STEP))
