"""Point operations as look-up tables: a new value for each of the 256 old ones, per sample and channel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qkd.agents.operations.blending import blend
from qkd.agents.policies.spaces import Space

FIXED_TABLES = ("Brightness", "Invert", "Posterize", "Solarize")  # the same for every image


@functools.lru_cache(maxsize=8)
def fixed_tables(space: Space, device: torch.device) -> Tensor:
    """Return the tables that are independent of images: uint8, shape ``[operation, level, sign, 256]``; sign 0 is plus.

    Operations are those of ``FIXED_TABLES``; one that the space does not have changes nothing.
    """
    tables = [
        _fixed_table(name, space.meaning(name, level, sign, 0)) if name in space.operations else torch.arange(256)
        for name in FIXED_TABLES
        for level in range(space.levels)
        for sign in (1, -1)
    ]
    made = torch.stack([table.to(torch.uint8) for table in tables])
    return made.view(len(FIXED_TABLES), space.levels, 2, 256).to(device)


def _fixed_table(name: str, value: float) -> Tensor:
    old = torch.arange(256)
    if name == "Brightness":
        return blend(torch.zeros(256), old, torch.tensor(value))
    if name == "Invert":
        return 255 - old
    if name == "Posterize":
        return old & ~((1 << (8 - int(value))) - 1)
    return torch.where(old.to(torch.float64) < value, old, 255 - old)  # float32 would round the threshold


def histograms(images: Tensor) -> Tensor:
    """Return how often each value occurs in each channel.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.

    Returns:
        int64, shape ``[batch, channels, 256]``.
    """
    shape = images.shape[:2]
    pixels = images.flatten(2).to(torch.int64)
    if images.device.type == "cpu":  # several times as fast as a scatter there
        pixels += torch.arange(0, 256 * shape.numel(), 256).view(*shape, 1)
        return torch.bincount(pixels.view(-1), minlength=256 * shape.numel()).view(*shape, 256)
    counts = torch.zeros((*shape, 256), dtype=torch.int64, device=images.device)
    return counts.scatter_add_(2, pixels, torch.ones_like(pixels))


def move_counts(counts: Tensor, tables: Tensor) -> Tensor:
    """Return the histograms of images after their values went through tables, exactly.

    Args:
        counts: int64, shape ``[batch, channels, 256]``.
        tables: uint8, same shape.
    """
    return torch.zeros_like(counts).scatter_add_(2, tables.to(torch.int64), counts)


def equalize_tables(counts: Tensor) -> Tensor:
    """Return tables that make each channel's values equally frequent, as ``PIL.ImageOps.equalize``.

    Args:
        counts: Histograms of the images, int64, shape ``[batch, channels, 256]``.

    Returns:
        uint8, shape ``[batch, channels, 256]``.
    """
    old = torch.arange(256, device=counts.device, dtype=torch.float64)
    found = counts.to(torch.float64)  # whole numbers far below 2 ** 53: as exact as integers, and faster to divide
    upto = found.cumsum(2)
    total = upto[:, :, -1:]
    # What is below the brightest value that occurs: the largest sum that is not yet the total.
    step = torch.where(upto < total, upto, 0.0).amax(2, keepdim=True).div_(255).floor_()
    new = (upto - found).add_((step / 2).floor_()).div_(step.clamp(min=1)).floor_().clamp_(max=255)
    return torch.where(step == 0, old, new).to(torch.uint8)


def autocontrast_tables(low: Tensor, high: Tensor) -> Tensor:
    """Return tables that stretch each channel's range to 0..255, as ``PIL.ImageOps.autocontrast``.

    Args:
        low: Smallest value of each channel, 0..255, shape ``[batch, channels]``.
        high: Largest value, same shape.

    Returns:
        uint8, shape ``[batch, channels, 256]``.
    """
    low, high = (edge.to(torch.float64).unsqueeze(2) for edge in (low, high))
    old = torch.arange(256, dtype=torch.float64, device=low.device)
    # Tensor by tensor: a number by a tensor would be rounded twice (reciprocal, then product).
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    # The product first and its negation second, truncated at the end: Pillow's own order of roundings.
    new = (old * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high <= low, old, new).to(torch.uint8)


def range_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value that occurs, int64, shape ``[batch, channels]`` each.

    Args:
        counts: Histograms, int64, shape ``[batch, channels, 256]``.
    """
    old = torch.arange(256, device=counts.device)
    return torch.where(counts > 0, old, 255).amin(2), torch.where(counts > 0, old, 0).amax(2)


def look_up(values: Tensor, tables: Tensor) -> Tensor:
    """Return tensors with every value replaced by its table's: one gather.

    Args:
        values: uint8, shape ``[batch, channels, n]``.
        tables: uint8, shape ``[batch, channels or 1, 256]``.

    Returns:
        uint8, shape of ``values``.
    """
    return tables.expand(-1, values.shape[1], -1).gather(2, values.to(torch.int64))
