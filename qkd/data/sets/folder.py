"""A data set in a folder of image files, one subfolder per class, decoded as batches need them."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.labels import listed, require_names
from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.data.sets.fitting import Fit
from qkd.data.sets.images import CROP, IMAGE_SUFFIXES, Header, decode_into, is_image, read_headers, refuse_sizes
from qkd.data.sets.layout import Layout, layout_of
from qkd.data.splits import Parts
from qkd.image_size import ImageSize, height_width, image_size_of
from qkd.units import counted

# what systems and programs leave in folders in addition to hidden files (".DS_Store", "._x.jpg", ".ipynb_checkpoints")
SYSTEM_NAMES = frozenset({
    "__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "ehthumbs.db",
    "desktop.ini",
})  # fmt: skip
SIDECARS = frozenset({".csv", ".json", ".md", ".txt", ".xml"})  # labels and remarks, which nobody takes for images
_NAMED = 3  # skipped files to name in a note
_KINDS = 5  # of other files to name in a note
# unsupported image formats, which a user should hear about
OTHER_IMAGE_SUFFIXES = frozenset({
    ".apng", ".arw", ".avif", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k",
    ".jfif", ".jp2", ".jpe", ".jxl", ".nef", ".orf", ".pcx", ".pfm", ".psd", ".raw", ".rw2", ".svg", ".tga", ".xcf",
})  # fmt: skip


@dataclass(frozen=True)
class Form:
    """The target form of the images in a folder, and how a folder without test images is split.

    Args:
        image_size: In pixels; None if all images already have the same size.
        fit: How images of other sizes are resized.
        channels: 1 or 3; None for 1 if all images are gray, otherwise 3.
        test_fraction: Share of each class that becomes the test part if the folder has none.
        split_seed: Seed of that split; the run's seed does not change which images are scored.
    """

    image_size: ImageSize | None = None
    fit: Fit = CROP
    channels: int | None = None
    test_fraction: float = 0.2
    split_seed: int = 0


AS_THEY_ARE = Form()


class FolderSplit:
    """A part whose images are files.

    Args:
        files: Paths of the images.
        labels: Class numbers, int64, shape ``[n]``.
        channels: Channels of the decoded images, 1 or 3.
        image_size: In pixels.
        fit: How images of other sizes are resized.
    """

    decodes = True

    def __init__(
        self, files: Sequence[Path], labels: Tensor, *, channels: int, image_size: ImageSize, fit: Fit = CROP
    ) -> None:
        self.files = tuple(files)
        self.labels = labels
        self.channels = channels
        self.image_size = image_size
        self.fit = fit

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of its images."""
        return self.channels, *height_width(self.image_size)

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Decode these images: uint8 ``[batch, channels, height, width]`` and labels int64 ``[batch]``.

        Raises:
            DataError: If a file cannot be decoded; the message names it.
        """
        indices = indices.cpu()
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            decode_into(images[row], self.files[index], self.fit)
        return images.to(device, non_blocking=True), self.labels[indices].to(device, non_blocking=True)

    def subset(self, indices: Tensor) -> FolderSplit:
        """Return the part with these images, in this order."""
        files = [self.files[index] for index in indices.tolist()]
        return self.like(files, self.labels[indices.cpu()])

    def like(self, files: Sequence[Path], labels: Tensor) -> FolderSplit:
        """Return a part with other files in the same form."""
        return FolderSplit(files, labels, channels=self.channels, image_size=self.image_size, fit=self.fit)

    def to(self, device: torch.device | str) -> FolderSplit:
        """Return itself, since files do not move."""
        return self


def load_folder_splits(folder: Path, form: Form = AS_THEY_ARE) -> Parts:
    """Load the parts of a folder of images, in any layout of :func:`~qkd.data.sets.layout.layout_of`.

    The header and the end of every file are read here, so that files that are not images, or are cut off, are reported
    before training starts.
    Images are gray if all of them are, otherwise color, unless ``form`` says which.

    Args:
        folder: Folder with ``train`` and ``test``, ``train`` and ``val``, or class folders.
        form: Target form of the images, and how a set without test images is split.

    Returns:
        Both parts, images decoded as batches need them, and the classes in alphabetical order.

    Raises:
        DataError: If a folder is missing or empty, a class is tested but not trained, a file is not a readable image
            or is cut off, or sizes differ and ``form`` has none.
        OSError: If a folder cannot be read.
    """
    found = list_folder(folder, form)
    looked = _Look(wants_one_size=form.image_size is None)
    paths = [path for part in (found.train, found.test) for path in part.files]  # type: ignore[attr-defined]
    headers = read_headers(paths)
    for path, header in zip(paths, headers, strict=True):
        looked.at(path, header)
    size, channels = form.image_size or looked.size(), form.channels or (1 if looked.is_gray else 3)
    height, width = height_width(size)
    for path, header in zip(paths, headers, strict=True):
        refuse_sizes(path, (header.width, header.height), (width, height), form.fit)
    parts = [FolderSplit(part.files, part.labels, channels=channels, image_size=size, fit=form.fit)  # type: ignore[attr-defined]
             for part in (found.train, found.test)]  # fmt: skip
    return found._replace(train=parts[0], test=parts[1])


def list_folder(folder: Path, form: Form = AS_THEY_ARE) -> Parts:
    """List the parts of a folder of images without reading the files: sizes and channels are unknown (both 1).

    Hidden files and folders, and files that systems leave behind, are skipped at every depth and counted in a note.

    Args:
        folder: As for :func:`load_folder_splits`.
        form: How a set without test images is split.

    Returns:
        Both parts, and the classes in alphabetical order.

    Raises:
        DataError: If a folder is missing or empty, a class is tested but not trained, an image is not a regular file,
            or a link is broken or leads to a folder within a class.
        OSError: If a folder cannot be read.
    """
    layout, skipped = layout_of(folder, is_hidden), _Skipped()
    if layout.train != folder:
        skipped.beside(folder, {layout.train, layout.val, layout.test})
    train_files = _files_by_class(layout.train, skipped)
    classes = require_names(sorted(train_files), layout.train, images=sum(map(len, train_files.values())))
    train = _as_split(train_files, classes)
    val_rows = None
    if layout.val is not None:
        val = _as_split(_known_files(layout.val, layout.train, classes, skipped), classes)
        val_rows = torch.arange(len(train), len(train) + len(val))
        train = train.like((*train.files, *val.files), torch.cat([train.labels, val.labels]))
    if layout.test is None:
        train, test = _divided(train, layout.train, form)
    else:
        test = _as_split(_known_files(layout.test, layout.train, classes, skipped), classes)
    return Parts(train, test, classes, skipped.notes(), val_rows, _words(layout, form))


def _known_files(folder: Path, train: Path, classes: Sequence[str], skipped: _Skipped) -> dict[str, list[Path]]:
    """Return the files of a part that is not trained on; its classes must be among those of the training images."""
    files, known = _files_by_class(folder, skipped), {composed(name): name for name in classes}
    if unknown := sorted(name for name in files if composed(name) not in known):
        raise DataError(f"{folder}: classes {listed(unknown)} are not in {train}, so they cannot be learned")
    return {known[composed(name)]: found for name, found in files.items()}


def _divided(everything: FolderSplit, folder: Path, form: Form) -> tuple[FolderSplit, FolderSplit]:
    """Split a set without a separate test part into training and test images: stratified, seeded."""
    counts = torch.bincount(everything.labels)
    wanted = torch.minimum(stratified_quotas(counts, round(len(everything) * form.test_fraction)), counts - 1)
    test, train = take_quotas(everything.labels, wanted, torch.Generator().manual_seed(form.split_seed))
    if not len(test):
        raise DataError(
            f"{folder}: has no test images, and {form.test_fraction:g} of its {len(everything)} images would leave "
            f"none for the test (every class keeps one for training); add images, or raise data.test_fraction"
        )
    return everything.subset(train), everything.subset(test)


def _words(layout: Layout, form: Form) -> str:
    """Return where the test images come from, for the line about held-out images."""
    if layout.test is not None:
        return f"{layout.test.name}/"
    return f"{form.test_fraction:g} of each class by data.split_seed {form.split_seed}, since there is no test/"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder does not belong to the set: hidden, or left behind by a system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def composed(name: str) -> str:
    """Return a name as it is compared: macOS decomposes accents in the names of folders, other systems do not.

    Args:
        name: Of a class or a folder.

    Example:
        >>> composed("u\u0308") == "\u00fc"
        True
    """
    return unicodedata.normalize("NFC", name)


def class_files(folder: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """List the images in class folders by the rules of training, without reading them.

    Args:
        folder: Folder of class folders.

    Returns:
        Class -> its files, sorted; and notes about what is skipped.

    Raises:
        DataError: As for :func:`list_folder`.
        OSError: If a folder cannot be read.
    """
    skipped = _Skipped()
    return _files_by_class(folder, skipped), skipped.notes()


def _files_by_class(folder: Path, skipped: _Skipped) -> dict[str, list[Path]]:
    children = sorted(folder.iterdir())
    skipped.hidden += [child.name for child in children if is_hidden(child.name)]
    skipped.outside += [child.name for child in children if _is_image(child)]
    dead = [child for child in children if not is_hidden(child.name) and not os.path.exists(child)]
    if dead:
        raise DataError(f"{dead[0]}: is a broken link, so its class would be missing; restore or delete it")
    found = {
        child.name: sorted(_images_below(child, skipped), key=lambda path: path.parts)
        for child in children
        if child.is_dir() and not is_hidden(child.name)
    }
    if not found:
        raise DataError(
            f"{folder}: has no class folders; needs {folder}/<class>/*.png|jpg|... (train, test and val are parts of a "
            "set, never classes)"
        )
    _refuse_two_spellings(folder, found)
    for name, files in found.items():
        if not files:
            raise DataError(
                f"{folder / name}: class folder without images ({', '.join(IMAGE_SUFFIXES)}); fill or delete it"
            )
    return found


def _refuse_two_spellings(folder: Path, names: Iterable[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(composed(name), name)) != name:
            raise DataError(
                f"{folder}: class folders {ascii(other)} and {ascii(name)} have one name, in two spellings of Unicode; "
                "move their images into one folder"
            )


def _is_image(path: Path) -> bool:
    named = path.suffix.lower() in (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES) and not is_hidden(path.name)
    return named and path.is_file()


def _images_below(folder: Path, skipped: _Skipped) -> Iterable[Path]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                skipped.hidden.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                yield from _images_below(Path(entry.path), skipped)
            elif os.path.isdir(entry.path):  # following a cycle of links would never end
                raise DataError(f"{entry.path}: is a link to a folder, which is not followed; copy or delete it")
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                if not os.path.isfile(entry.path):
                    raise DataError(f"{entry.path}: is not a file, or is a broken link; restore or delete it")
                yield Path(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in OTHER_IMAGE_SUFFIXES:
                skipped.unread.append(entry.name)
            elif os.path.splitext(entry.name)[1].lower() not in SIDECARS:
                skipped.others.append(Path(entry.path))


@dataclass
class _Skipped:
    """The skipped files and folders of a set."""

    hidden: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # images in unsupported formats
    outside: list[str] = field(default_factory=list)  # images in no class folder
    folders: list[str] = field(default_factory=list)  # beside the parts
    others: list[Path] = field(default_factory=list)  # in class folders, with the suffix of no image

    def beside(self, folder: Path, parts: Collection[Path | None]) -> None:
        """Note what is in the folder of a set, but in none of its parts."""
        children = [child for child in folder.iterdir() if not is_hidden(child.name) and child not in parts]
        self.folders += [child.name for child in children if child.is_dir()]
        self.outside += [child.name for child in children if _is_image(child)]

    def notes(self) -> tuple[str, ...]:
        """Return one line per kind."""
        kinds = ", ".join(suffix.lstrip(".") for suffix in IMAGE_SUFFIXES)
        unread = f"not read (supported: {kinds}; convert to one of them)"
        found = (
            (self.hidden, "hidden file or folder", "hidden files and folders", "skipped"),
            (self.unread, "image in an unsupported format", "images in unsupported formats", unread),
            (self.outside, "image outside class folders", "images outside class folders", "not read"),
            (self.folders, "folder beside the parts of the set", "folders beside the parts of the set", "not read"),
        )
        notes = tuple(
            f"{len(names):,} {one if len(names) == 1 else many} {what} ({_some(names)})"
            for names, one, many, what in found if names
        )  # fmt: skip
        return (*notes, self._note_of_others()) if self.others else notes

    def _note_of_others(self) -> str:
        kinds = Counter(path.suffix.lower() for path in self.others).most_common()
        words = [f"{count:,} {ascii(kind)[1:-1] or 'without a suffix'}" for kind, count in kinds[:_KINDS]]
        more = ", ..." if len(kinds) > _KINDS else ""
        images = sum(is_image(path) for path in self.others)  # their first bytes are read
        way = f"; {images:,} of them {'is an image' if images == 1 else 'are images'}: rename to .jpg, .png, ..."
        of = counted(len(self.others), "other file")
        return f"{of} in class folders not read ({', '.join(words)}{more}){way if images else ''}"


def _some(skipped: Sequence[str]) -> str:
    names = sorted(set(skipped))
    return ", ".join(map(ascii, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")


@dataclass
class _Look:
    """What the image headers of a set have in common."""

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

    def size(self) -> ImageSize:
        if self.first is None:
            raise DataError("the set has no images")
        return image_size_of(self.first[1].height, self.first[1].width)


def _as_split(files: dict[str, list[Path]], classes: tuple[str, ...]) -> FolderSplit:
    numbers = {name: number for number, name in enumerate(classes)}
    pairs = [(path, numbers[name]) for name in sorted(files) for path in files[name]]
    labels = torch.tensor([label for _, label in pairs], dtype=torch.int64)
    return FolderSplit([path for path, _ in pairs], labels, channels=1, image_size=1)
