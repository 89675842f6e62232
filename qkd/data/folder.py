"""A data set kept as a folder of image files, one sub-folder a class, decoded when a batch asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qkd.data.errors import DataError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"P", "RGB", "RGBA", "CMYK", "YCbCr"})
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class _Header:
    """What an image file says of itself before it is decoded."""

    width: int
    height: int
    is_grey: bool


class FolderSplit:
    """A part whose images lie in files.

    Args:
        files: Paths of the images.
        labels: Class numbers, int64, shape ``[n]``.
        channels: 1 or 3; what images are converted to.
        image_size: Side in pixels. An image of another size is resized (shorter side, bilinear) and cropped (centre).
    """

    decodes = True

    def __init__(self, files: Sequence[Path], labels: Tensor, *, channels: int, image_size: int) -> None:
        self.files = tuple(files)
        self.labels = labels
        self.channels = channels
        self.image_size = image_size

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Decode these images: uint8 ``[batch, channels, height, width]`` and labels int64 ``[batch]``.

        Raises:
            DataError: If a file cannot be decoded; names it.
        """
        indices = indices.cpu()
        shape = (len(indices), self.channels, self.image_size, self.image_size)
        images = torch.empty(shape, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            images[row] = decode(self.files[index], channels=self.channels, image_size=self.image_size)
        return images.to(device, non_blocking=True), self.labels[indices].to(device, non_blocking=True)

    def subset(self, indices: Tensor) -> FolderSplit:
        """Return the part made of these images, in this order."""
        files = [self.files[index] for index in indices.tolist()]
        return FolderSplit(files, self.labels[indices.cpu()], channels=self.channels, image_size=self.image_size)

    def to(self, device: torch.device | str) -> FolderSplit:
        """Return itself: files stay where they are."""
        return self


def load_folder_splits(folder: Path, image_size: int | None) -> tuple[FolderSplit, FolderSplit, tuple[str, ...]]:
    """Return ``(train, test, classes)`` of ``folder/train/<class>/*`` and ``folder/test/<class>/*``.

    Every file's header is read here, so that one that is no image is named before training starts. Images are grey
    where all of them are, else colour.

    Args:
        folder: Holds ``train`` and ``test``.
        image_size: Side in pixels that images are resized to; None: all must be square and of one size already.

    Raises:
        DataError: If a folder is missing or empty, a class is tested but not trained, a file is no readable image, or
            sizes differ and ``image_size`` is None.
    """
    train_files = _files_by_class(folder / "train")
    test_files = _files_by_class(folder / "test")
    classes = tuple(sorted(train_files))
    unknown = sorted(set(test_files) - set(classes))
    if unknown:
        raise DataError(f"{folder / 'test'}: classes {unknown} are not in {folder / 'train'}: nothing could learn them")
    headers = {
        path: _read_header(path) for part in (train_files, test_files) for files in part.values() for path in files
    }
    side = image_size or _common_side(headers)
    channels = 1 if all(header.is_grey for header in headers.values()) else 3
    parts = [_as_split(files, classes, channels=channels, image_size=side) for files in (train_files, test_files)]
    return parts[0], parts[1], classes


def decode(path: Path, *, channels: int, image_size: int) -> Tensor:
    """Return an image file as uint8 ``[channels, image_size, image_size]``.

    Raises:
        DataError: If the file cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or delete it") from error
    pixels = torch.from_numpy(np.array(_fit(image, image_size), dtype=np.uint8))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the shorter side is ``side``, then cut the centre out."""
    width, height = image.size
    if (width, height) == (side, side):
        return image
    factor = side / min(width, height)
    resized = image.resize(
        (max(side, round(width * factor)), max(side, round(height * factor))), Image.Resampling.BILINEAR
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    return resized.crop((left, top, left + side, top + side))


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; needs train/<class>/*.png|jpg|... and test/<class>/... beside it")
    found = {
        child.name: sorted(
            file for file in child.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
        )
        for child in sorted(folder.iterdir())
        if child.is_dir() and not child.name.startswith(".")
    }
    if not found:
        raise DataError(f"{folder}: has no class folders; needs {folder}/<class>/*.png|jpg|...")
    for name, files in found.items():
        if not files:
            raise DataError(
                f"{folder / name}: class folder without images ({', '.join(IMAGE_SUFFIXES)}); fill or delete it"
            )
    return found


def _read_header(path: Path) -> _Header:
    try:
        with Image.open(path) as file:
            mode, (width, height) = file.mode, file.size
    except _UNREADABLE as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or delete it") from error
    if mode not in _GREY_MODES | _COLOUR_MODES:
        raise DataError(
            f"{path}: its pixels are of mode {mode!r}, not 8 bit a channel; convert it to 8-bit grey or RGB"
        )
    return _Header(width, height, mode in _GREY_MODES)


def _common_side(headers: dict[Path, _Header]) -> int:
    first_path, first = next(iter(headers.items()))
    for path, header in headers.items():
        if (header.width, header.height) != (first.width, first.height):
            raise DataError(
                f"{path}: is {header.width}x{header.height}, but {first_path} is {first.width}x{first.height}; "
                "set data.image_size to resize them all"
            )
    if first.width != first.height:
        raise DataError(f"{first_path}: is {first.width}x{first.height}, not square; set data.image_size to crop")
    return first.width


def _as_split(files: dict[str, list[Path]], classes: tuple[str, ...], *, channels: int, image_size: int) -> FolderSplit:
    pairs = [(path, classes.index(name)) for name in sorted(files) for path in files[name]]
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return FolderSplit([path for path, _ in pairs], labels, channels=channels, image_size=image_size)
