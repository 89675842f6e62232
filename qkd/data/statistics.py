"""Exact per-channel mean and standard deviation of the images of a part, a few images at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from qkd.data.splits import Split

SMALLEST_STD = 1 / 255  # one gray level: a channel that never changes must not divide by zero
LARGEST_SAMPLE = 4096  # images to decode: their mean is accurate to about 0.005, and a folder may hold a million
_CHUNK_VALUES = 1 << 20  # pixel values at a time; their int32 squares take 4 MiB
_CHUNK_IMAGES = 1024


def channel_statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ``(mean, std)`` per channel as fractions of the full range, from exact sums over integer pixels.

    More than 4,096 files that must be decoded are sampled evenly. A std below one gray level is raised to one gray
    level.

    Raises:
        DataError: If an image cannot be decoded.
        ValueError: If the split is empty.
    """
    if len(split) == 0:
        raise ValueError("cannot compute the mean of zero images")
    chosen = _evenly(len(split), LARGEST_SAMPLE) if split.decodes else torch.arange(len(split))
    values = split.batch(chosen[:1], "cpu")[0].numel()
    count, total, squares = 0, torch.zeros(0), torch.zeros(0)
    for chunk in torch.split(chosen, max(1, min(_CHUNK_IMAGES, _CHUNK_VALUES // values))):
        pixels = split.batch(chunk, "cpu")[0].transpose(0, 1).flatten(1).to(torch.int32)
        sums, sums_of_squares = pixels.sum(1, dtype=torch.int64), (pixels * pixels).sum(1, dtype=torch.int64)
        total, squares = (sums, sums_of_squares) if count == 0 else (total + sums, squares + sums_of_squares)
        count += pixels.shape[1]
    mean = total.double() / count
    variance = (squares.double() / count - mean * mean).clamp(min=0)
    std = (variance.sqrt() / 255).clamp(min=SMALLEST_STD)
    return tuple((mean / 255).tolist()), tuple(std.tolist())


def _evenly(n: int, most: int) -> Tensor:
    return torch.arange(n) if n <= most else torch.arange(most) * n // most
