"""Facts computed from the images: per-channel mean and spread, and a hash for provenance."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from qkd.data.folder import FolderSplit
from qkd.data.splits import MemorySplit, Split

SMALLEST_STD = 1 / 255  # one grey level: a channel that never changes must not divide by zero
LARGEST_SAMPLE = 4096  # decoded images: the mean of so many is good to about 0.005, and a folder may hold a million
_CHUNK = 1024


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ``(mean, std)`` per channel as fractions of the full range, exact sums over integer pixels.

    Files that must be decoded are sampled evenly where there are more than 4,096 of them. A std below one grey level
    counts as one grey level.

    Raises:
        DataError: If an image cannot be decoded.
        ValueError: If the split is empty.
    """
    if len(split) == 0:
        raise ValueError("cannot take the mean of no images")
    chosen = _evenly(len(split), LARGEST_SAMPLE) if split.decodes else torch.arange(len(split))
    count, total, squares = 0, torch.zeros(0), torch.zeros(0)
    for chunk in torch.split(chosen, _CHUNK):
        pixels = split.batch(chunk, "cpu")[0].transpose(0, 1).flatten(1).to(torch.int64)
        sums, sums_of_squares = pixels.sum(1), (pixels * pixels).sum(1)
        total, squares = (sums, sums_of_squares) if count == 0 else (total + sums, squares + sums_of_squares)
        count += pixels.shape[1]
    mean = total.double() / count
    variance = (squares.double() / count - mean * mean).clamp(min=0)
    std = (variance.sqrt() / 255).clamp(min=SMALLEST_STD)
    return tuple((mean / 255).tolist()), tuple(std.tolist())


def fingerprint(train: Split, test: Split, classes: tuple[str, ...], root: Path | None) -> str:
    """Return the SHA-256 (hexadecimal) of a data set before it is split.

    Sets in memory: their pixels, shapes, labels and class names. Folders: names (below ``root``) and sizes of the
    files.
    """
    digest = hashlib.sha256("\n".join(classes).encode())
    for split in (train, test):
        if isinstance(split, MemorySplit):
            _hash_tensor(digest, split.images)
        if isinstance(split, FolderSplit):
            for path in split.files:
                name = path.relative_to(root).as_posix() if root else path.name
                digest.update(f"{name}\t{path.stat().st_size}\n".encode())
        _hash_tensor(digest, split.labels)
    return digest.hexdigest()


def _hash_tensor(digest: hashlib._Hash, values: Tensor) -> None:
    digest.update(str(tuple(values.shape)).encode())
    digest.update(values.cpu().contiguous().numpy().data)


def _evenly(n: int, most: int) -> Tensor:
    return torch.arange(n) if n <= most else torch.arange(most) * n // most
