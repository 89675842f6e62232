"""A data set kept as a folder of image files, one sub-folder a class, decoded when a batch asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.labels import listed, require_names
from qkd.data.sets.images import IMAGE_SUFFIXES, Header, decode, read_header
from qkd.data.splits import Parts

# what systems and programs put into folders beside hidden files (".DS_Store", "._x.jpg", ".ipynb_checkpoints")
SYSTEM_NAMES = frozenset({
    "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "ehthumbs.db",
    "desktop.ini",
})  # fmt: skip
_NAMED = 3  # skipped files that a note names
# images of kinds that are not read; a person would miss them
OTHER_IMAGE_SUFFIXES = frozenset({
    ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k",
    ".jfif", ".jp2", ".jpe", ".jxl", ".nef", ".orf", ".pcx", ".pfm", ".psd", ".raw", ".rw2", ".svg", ".tga", ".xcf",
})  # fmt: skip


class FolderSplit:
    """A part whose images are in files.

    Args:
        files: Paths of the images.
        labels: Class numbers, int64, shape ``[n]``.
        channels: 1 or 3; what images are converted to.
        image_size: Side in pixels. An image of another size is resized (shorter side, bilinear) and cropped (center).
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of its images."""
        return self.channels, self.image_size, self.image_size

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


def load_folder_splits(folder: Path, image_size: int | None) -> Parts:
    """Return the parts of ``folder/train/<class>/*`` and ``folder/test/<class>/*``.

    Every file's header is read here, so that one that is no image is named before training starts. Images are gray
    where all of them are, else color.

    Args:
        folder: Holds ``train`` and ``test``.
        image_size: Side in pixels that images are resized to; None: all must be square and of one size already.

    Returns:
        Both parts, images decoded as batches need them, and the classes in alphabetical order.

    Raises:
        DataError: If a folder is missing or empty, a class is tested but not trained, a file is no readable image, or
            sizes differ and ``image_size`` is None.
        OSError: If a folder cannot be read.
    """
    found = list_folder(folder)
    looked = _Look(wants_one_size=image_size is None)
    for part in (found.train, found.test):
        for path in part.files:  # type: ignore[attr-defined]
            looked.at(path, read_header(path))
    side, channels = image_size or looked.side(), 1 if looked.is_gray else 3
    parts = [FolderSplit(part.files, part.labels, channels=channels, image_size=side)  # type: ignore[attr-defined]
             for part in (found.train, found.test)]  # fmt: skip
    return Parts(parts[0], parts[1], found.classes, found.notes)


def list_folder(folder: Path) -> Parts:
    """Return the parts of a folder of images by their files alone: nothing is known of sizes and channels (both 1).

    Hidden files and folders, and what systems leave behind, are skipped at every depth; a note counts them.

    Args:
        folder: As for :func:`load_folder_splits`.

    Returns:
        Both parts, and the classes in alphabetical order.

    Raises:
        DataError: If a folder is missing or empty, a class is tested but not trained, an image is no regular file, or a
            link leads nowhere or to a folder within a class.
        OSError: If a folder cannot be read.
    """
    skipped = _Skipped()
    train_files, test_files = (_files_by_class(folder / part, skipped) for part in ("train", "test"))
    classes = require_names(sorted(train_files), folder / "train", images=sum(map(len, train_files.values())))
    unknown = sorted(set(test_files) - set(classes))
    if unknown:
        raise DataError(
            f"{folder / 'test'}: classes {listed(unknown)} are not in {folder / 'train'}: nothing could learn them"
        )
    parts = [_as_split(files, classes) for files in (train_files, test_files)]
    return Parts(parts[0], parts[1], classes, skipped.notes())


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is none of the set's own: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def _files_by_class(folder: Path, skipped: _Skipped) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; needs train/<class>/*.png|jpg|... and test/<class>/... beside it")
    children = sorted(folder.iterdir())
    skipped.hidden += [child.name for child in children if is_hidden(child.name)]
    dead = [child for child in children if not is_hidden(child.name) and not os.path.exists(child)]
    if dead:
        raise DataError(f"{dead[0]}: links to nothing, so its class would be missing; restore or delete it")
    found = {
        child.name: sorted(_images_below(child, skipped), key=lambda path: path.parts)
        for child in children
        if child.is_dir() and not is_hidden(child.name)
    }
    if not found:
        raise DataError(f"{folder}: has no class folders; needs {folder}/<class>/*.png|jpg|...")
    for name, files in found.items():
        if not files:
            raise DataError(
                f"{folder / name}: class folder without images ({', '.join(IMAGE_SUFFIXES)}); fill or delete it"
            )
    return found


def _images_below(folder: Path, skipped: _Skipped) -> Iterable[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                skipped.hidden.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                yield from _images_below(Path(entry.path), skipped)
            elif os.path.isdir(entry.path):  # a circle of links would never end
                raise DataError(f"{entry.path}: links to a folder, which is not followed; copy or delete it")
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                if not os.path.isfile(entry.path):
                    raise DataError(f"{entry.path}: is no file, or links to none; restore or delete it")
                yield Path(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in OTHER_IMAGE_SUFFIXES:
                skipped.unread.append(entry.name)


@dataclass
class _Skipped:
    """Names of what was passed over below a set's folders."""

    hidden: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # images of kinds that are not read

    def notes(self) -> tuple[str, ...]:
        """Return a line for each sort of them."""
        kinds = ", ".join(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES)
        lines = {
            "hidden files and folders skipped": self.hidden,
            f"images of other kinds not read (known: {kinds}; convert them)": self.unread,
        }
        return tuple(f"{len(names):,} {line} ({_some(names)})" for line, names in lines.items() if names)


def _some(skipped: Sequence[str]) -> str:
    names = sorted(set(skipped))
    return ", ".join(map(ascii, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


@dataclass
class _Look:
    """What the headers of a set's images have in common."""

    wants_one_size: bool
    is_gray: bool = True
    first: tuple[Path, Header] | None = field(default=None)

    def at(self, path: Path, header: Header) -> None:
        self.is_gray = self.is_gray and header.is_gray
        first_path, first = self.first = self.first or (path, header)
        if self.wants_one_size and (header.width, header.height) != (first.width, first.height):
            raise DataError(
                f"{path}: is {header.width}x{header.height}, but {first_path} is {first.width}x{first.height}; "
                "set data.image_size to resize them all"
            )

    def side(self) -> int:
        if self.first is None:
            raise DataError("the set has no images")
        path, header = self.first
        if header.width != header.height:
            raise DataError(f"{path}: is {header.width}x{header.height}, not square; set data.image_size to crop")
        return header.width


def _as_split(files: dict[str, list[Path]], classes: tuple[str, ...]) -> FolderSplit:
    numbers = {name: number for number, name in enumerate(classes)}
    pairs = [(path, numbers[name]) for name in sorted(files) for path in files[name]]
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return FolderSplit([path for path, _ in pairs], labels, channels=1, image_size=1)
