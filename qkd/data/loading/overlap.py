"""Images that occur in more than one part of a set: a student that has seen a test image is not tested by it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkd.data.loading.facts import WHOLE_BYTES, Digest, file_sizes, pixels_of
from qkd.data.sets import FolderSplit
from qkd.data.splits import Parts, Split

MOST_IMAGES = 1 << 18  # in memory or in rows of a file; each is hashed
_BLOCK = 1 << 20  # bytes of images that are looked at together
_MIB = 1 << 20
_SEEN = "so that their accuracy says nothing about new ones"


@dataclass(frozen=True)
class _Pair:
    """Images that are held out, and those that they should not be among.

    Args:
        held_out: What the first are called.
        others: What the second are called.
        part: The part that the first are in; the second are in the training part.
        rows: Positions of the first.
        among: Positions of the second.
        harm: What common images do, and what to do about it.
    """

    held_out: str
    others: str
    part: Split
    rows: Tensor
    among: Tensor
    harm: str


class _TooMuchError(Exception):
    """The images are not compared; the message says why."""


def overlap_notes(parts: Parts, hash_file: Digest, drawn: Tensor | None = None) -> list[str]:
    """Return one line for each held-out part with images of another part: the same pixels, or the same file.

    Test and validation images are looked for among those that are trained on, and test images in the set's own
    validation part. Files are told apart by their sizes, and read only where these agree. Nothing is compared if more
    than 512 MiB would have to be read for it, or more than 262,144 images that are not files; a line says so. Images
    that are merely similar, or the same image in another format, are not found.

    Args:
        parts: The set before its images are resized.
        hash_file: Returns the hash of a file. Files of parts up to 512 MiB are taken to be hashed already.
        drawn: Positions in ``parts.train`` of the validation images, if they are drawn from it.

    Raises:
        DataError: If a file cannot be read.
    """
    search, notes, omitted, reasons = _Search(parts, hash_file), [], [], []
    for pair in _pairs(parts, drawn):
        try:
            count = search.repeated(pair)
        except _TooMuchError as error:
            omitted.append(f"{pair.held_out} among {pair.others} images")
            reasons.append(str(error))
            continue
        if count:
            notes.append(
                f"{count:,} of {len(pair.rows):,} {pair.held_out} images are also {pair.others} images, {pair.harm}"
            )
    if omitted:
        notes.append(f"copies were not looked for ({', '.join(omitted)}), because {reasons[0]}")
    return notes


def _pairs(parts: Parts, drawn: Tensor | None) -> Iterator[_Pair]:
    own, learned, test = parts.val_rows, parts.learned_rows, torch.arange(len(parts.test))
    remove = "remove them from one of the parts"
    yield _Pair("test", "training", parts.test, test, learned, f"{_SEEN}; {remove}")
    if own is not None:
        yield _Pair("validation", "training", parts.train, own, learned, f"{_SEEN}; {remove}")
        chosen = "so that the test is of images that the student is chosen by"
        yield _Pair("test", "validation", parts.test, test, own, f"{chosen}; {remove}")
    elif drawn is not None and len(drawn):
        copies = "the set holds copies, and the validation part is drawn from it: remove them"
        rest = learned[~torch.isin(learned, drawn)]
        yield _Pair("validation", "training", parts.train, drawn, rest, f"{_SEEN}; {copies}")


class _Search:
    """Counts images in more than one part; what was read once is kept."""

    def __init__(self, parts: Parts, hash_file: Digest) -> None:
        self.train, self.hash_file = parts.train, hash_file
        self.sizes: dict[int, list[int]] = {}  # id of a part -> bytes of its files
        self.digests: dict[int, list[bytes]] = {}  # id of a part -> hash of each image

    def repeated(self, pair: _Pair) -> int:
        """Return how many of the images are among the others."""
        if isinstance(self.train, FolderSplit) and isinstance(pair.part, FolderSplit):
            return self._repeated_files(self.train, pair.part, pair)
        if self.train.image_shape != pair.part.image_shape:
            return 0
        count = len(self.train) if pair.part is self.train else len(self.train) + len(pair.part)
        if count > MOST_IMAGES:
            raise _TooMuchError(f"there are more than {MOST_IMAGES:,} images")
        _refuse_bytes(count * math.prod(self.train.image_shape))
        ours, theirs = self._digests_of(self.train), self._digests_of(pair.part)
        found = {ours[row] for row in pair.among.tolist()}
        return sum(theirs[row] in found for row in pair.rows.tolist())

    def _repeated_files(self, train: FolderSplit, part: FolderSplit, pair: _Pair) -> int:
        sizes, others = self._sizes_of(train), self._sizes_of(part)
        common = {sizes[row] for row in pair.among.tolist()} & {others[row] for row in pair.rows.tolist()}
        ours = [row for row in pair.among.tolist() if sizes[row] in common]
        theirs = [row for row in pair.rows.tolist() if others[row] in common]
        _refuse_bytes(_to_read(sizes, ours) + _to_read(others, theirs))
        seen = {self.hash_file(train.files[row]) for row in ours}
        return sum(self.hash_file(part.files[row]) in seen for row in theirs)

    def _sizes_of(self, part: FolderSplit) -> list[int]:
        if id(part) not in self.sizes:
            self.sizes[id(part)] = file_sizes(part)
        return self.sizes[id(part)]

    def _digests_of(self, part: Split) -> list[bytes]:
        if id(part) not in self.digests:
            self.digests[id(part)] = list(_image_digests(part))
        return self.digests[id(part)]


def _to_read(sizes: Sequence[int], rows: Iterable[int]) -> int:
    """Return the bytes of these files; none if the part is small enough that all its files have been read."""
    return 0 if sum(sizes) <= WHOLE_BYTES else sum(sizes[row] for row in rows)


def _refuse_bytes(count: int) -> None:
    if count > WHOLE_BYTES:
        raise _TooMuchError(f"{count // _MIB:,} MiB would have to be read, more than {WHOLE_BYTES // _MIB:,}")


def _image_digests(split: Split) -> Iterator[bytes]:
    step = max(1, _BLOCK // max(1, math.prod(split.image_shape)))
    for chunk in torch.split(torch.arange(len(split)), step):
        for image in pixels_of(split, chunk).contiguous().numpy():
            yield hashlib.sha256(image.tobytes()).digest()
