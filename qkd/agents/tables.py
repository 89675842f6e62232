"""Point operations as look-up tables: a new value for each of the 256 old ones, per sample and channel."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qkd.agents.blending import blend, luminance
from qkd.agents.magnitudes import enhance_factor, posterize_bits, solarize_threshold
from qkd.agents.policy import LEVELS

FIXED_TABLES = ("Brightness", "Invert", "Posterize", "Solarize")  # the same for every image
IMAGE_TABLES = ("Contrast", "Equalize", "AutoContrast")  # made from the image's own statistics


@functools.lru_cache(maxsize=1)
def fixed_table() -> Tensor:
    """Return the tables that no image changes, in the order of ``FIXED_TABLES``: uint8, ``[operation, level, 256]``."""
    old = torch.arange(256)
    rows = {
        "Brightness": [blend(torch.zeros(256), old, torch.tensor(enhance_factor(level))) for level in range(LEVELS)],
        "Invert": [255 - old] * LEVELS,
        "Posterize": [old & ~((1 << (8 - posterize_bits(level))) - 1) for level in range(LEVELS)],
        "Solarize": [torch.where(old < solarize_threshold(level), old, 255 - old) for level in range(LEVELS)],
    }
    return torch.stack([torch.stack([row.to(torch.uint8) for row in rows[name]]) for name in FIXED_TABLES])


def contrast_tables(images: Tensor, factors: Tensor) -> Tensor:
    """Return tables that pull every value towards the mean grey of its image, or away from it.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        factors: float32, shape ``[batch]``; 1 changes nothing.

    Returns:
        uint8, shape ``[batch, 1, 256]``.
    """
    grey = luminance(images).flatten(1).to(torch.int64)
    count = grey.shape[1]
    mean = (2 * grey.sum(1) + count) // (2 * count)  # rounded half up, in integers
    old = torch.arange(256, device=images.device)
    return blend(mean.view(-1, 1), old.view(1, -1), factors.view(-1, 1)).unsqueeze(1)


def equalize_tables(images: Tensor) -> Tensor:
    """Return tables that make each channel's values equally frequent, as ``PIL.ImageOps.equalize``.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.

    Returns:
        uint8, shape ``[batch, channels, 256]``.
    """
    pixels = images.flatten(2).to(torch.int64)
    counts = torch.zeros((*pixels.shape[:2], 256), dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, pixels, torch.ones((), dtype=torch.int64, device=images.device).expand_as(pixels))
    brightest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - brightest) // 255
    below = counts.cumsum(2) - counts
    new = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    old = torch.arange(256, device=images.device)
    return torch.where(step == 0, old, new).to(torch.uint8)


def autocontrast_tables(images: Tensor) -> Tensor:
    """Return tables that stretch each channel's range to 0..255, as ``PIL.ImageOps.autocontrast``.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.

    Returns:
        uint8, shape ``[batch, channels, 256]``.
    """
    low, high = (edge.to(torch.float64).unsqueeze(2) for edge in torch.aminmax(images.flatten(2), dim=2))
    old = torch.arange(256, dtype=torch.float64, device=images.device)
    # Tensor by tensor: a number by a tensor would be rounded twice (reciprocal, then product).
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)
    # The product first and its negation second, truncated at the end: Pillow's own order of roundings.
    new = (old * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high <= low, old, new).to(torch.uint8)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Return images with every value replaced by its table's: one gather.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        tables: uint8, shape ``[batch, channels or 1, 256]``.

    Returns:
        uint8, shape of ``images``.
    """
    values = images.flatten(2).to(torch.int64)
    return tables.expand(-1, images.shape[1], -1).gather(2, values).view_as(images)
