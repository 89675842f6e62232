"""Images that occur in more than one part of a set: a student that has seen a test image is not tested by it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from qkd.data.loading.facts import WHOLE_BYTES, Digest, file_sizes, pixels_of
from qkd.data.sets import FolderSplit
from qkd.data.splits import Parts, Split

MOST_IMAGES = 1 << 18  # in memory or in rows of a file; each is hashed
_BLOCK = 1 << 20  # bytes of images that are looked at together


def overlap_notes(parts: Parts, hash_file: Digest) -> list[str]:
    """Return one line for each held-out part with images that are trained on: the same pixels, or the same file.

    Files are told apart by their sizes, and read only where these agree. Nothing is compared if more than 512 MiB would
    have to be read, or more than 262,144 images that are not files. Images that are merely similar, or the same image
    in another format, are not found.

    Args:
        parts: The set before its images are resized.
        hash_file: Returns the hash of a file.

    Raises:
        DataError: If a file cannot be read.
    """
    own = parts.val_rows
    learned = torch.arange(len(parts.train))
    held_out = [("test", parts.test, torch.arange(len(parts.test)))]
    if own is not None:
        learned = learned[~torch.isin(learned, own)]
        held_out.append(("validation", parts.train, own))
    found = [(name, _repeated(parts.train, learned, part, rows, hash_file), len(rows)) for name, part, rows in held_out]
    return [
        f"{count:,} of {total:,} {name} images are also training images, so that their accuracy says nothing about "
        f"new ones; remove them from one of the parts"
        for name, count, total in found if count
    ]  # fmt: skip


def _repeated(train: Split, learned: Tensor, part: Split, rows: Tensor, hash_file: Digest) -> int:
    """Return how many images of a part, at the given rows, are among the training images at theirs."""
    if isinstance(train, FolderSplit) and isinstance(part, FolderSplit):
        sizes, others = file_sizes(train), file_sizes(part)
        common = {sizes[row] for row in learned.tolist()} & {others[row] for row in rows.tolist()}
        ours = [row for row in learned.tolist() if sizes[row] in common]
        theirs = [row for row in rows.tolist() if others[row] in common]
        if sum(sizes[row] for row in ours) + sum(others[row] for row in theirs) > WHOLE_BYTES:
            return 0
        seen = {hash_file(train.files[row]) for row in ours}
        return sum(hash_file(part.files[row]) in seen for row in theirs)
    if train.image_shape != part.image_shape:
        return 0
    count = len(learned) + len(rows)
    if count > MOST_IMAGES or count * math.prod(train.image_shape) > WHOLE_BYTES:
        return 0
    found = set(_image_digests(train, learned))
    return sum(one in found for one in _image_digests(part, rows))


def _image_digests(split: Split, rows: Tensor) -> Iterable[bytes]:
    step = max(1, _BLOCK // max(1, math.prod(split.image_shape)))
    for chunk in torch.split(rows, step):
        for image in pixels_of(split, chunk).contiguous().numpy():
            yield hashlib.sha256(image.tobytes()).digest()
