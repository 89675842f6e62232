"""Geometric operations as index maps: where each pixel of a sample comes from, in Pillow's fixed-point arithmetic."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qkd.agents.magnitudes import rotate_degrees, shear_slope, translate_pixels
from qkd.agents.policy import LEVELS

GEOMETRIC = ("Rotate", "TranslateX", "TranslateY", "ShearX", "ShearY")
_FRACTION_BITS = 16  # of Pillow's nearest-neighbour affine transform
_ONE = 1 << _FRACTION_BITS


def fixed_point(matrix: Sequence[float]) -> tuple[int, ...]:
    """Return an affine map as Pillow's 16-bit fixed-point integers, sampled at pixel centres.

    Args:
        matrix: ``(a, b, c, d, e, f)``: pixel ``(x, y)`` of the result comes from ``(a x + b y + c, d x + e y + f)``.

    Returns:
        The six integers; the source pixel is ``(a x + b y + c) >> 16``.
    """
    a, b, c, d, e, f = matrix
    centred = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return tuple(math.floor(value * _ONE + 0.5) for value in centred)


def rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Return the affine map that rotates by ``degrees`` counter-clockwise about the centre."""
    angle = -math.radians(degrees % 360)
    # 15 digits, as Pillow rounds them, so that right angles are exact.
    cos, sin, minus_sin = round(math.cos(angle), 15), round(math.sin(angle), 15), round(-math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, minus_sin, cos, minus_sin * -x + cos * -y + y


def operation_matrix(name: str, level: int, *, sign: int, height: int, width: int) -> tuple[float, ...]:
    """Return the affine map of a geometric operation.

    Args:
        name: One of ``GEOMETRIC``.
        level: 0..9.
        sign: 1 or -1.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Raises:
        ValueError: If the operation is not geometric.
    """
    if name == "Rotate":
        return rotation(sign * rotate_degrees(level), height, width)
    if name == "TranslateX":
        return 1, 0, sign * translate_pixels(level, width), 0, 1, 0
    if name == "TranslateY":
        return 1, 0, 0, 0, 1, sign * translate_pixels(level, height)
    if name == "ShearX":
        return 1, sign * shear_slope(level), 0, 0, 1, 0
    if name == "ShearY":
        return 1, 0, 0, sign * shear_slope(level), 1, 0
    raise ValueError(f"not a geometric operation: {name!r}")


@functools.lru_cache(maxsize=32)
def map_table(height: int, width: int) -> Tensor:
    """Return every geometric operation's map: int64, shape ``[operation, level, sign, 6]``; sign 0 is plus, 1 minus."""
    rows = [
        fixed_point(operation_matrix(name, level, sign=sign, height=height, width=width))
        for name in GEOMETRIC
        for level in range(LEVELS)
        for sign in (1, -1)
    ]
    return torch.tensor(rows, dtype=torch.int64).view(len(GEOMETRIC), LEVELS, 2, 6)


def crop_flip(images: Tensor, offsets_x: Tensor, offsets_y: Tensor, is_flipped: Tensor, fill: Tensor) -> Tensor:
    """Return images shifted by whole pixels and then mirrored left to right where asked: one gather.

    Args:
        images: Shape ``[batch, channels, height, width]``, any dtype.
        offsets_x: Source column of the first result column, int64, shape ``[batch]``; negative: from the padding.
        offsets_y: Source row of the first result row, int64, shape ``[batch]``.
        is_flipped: bool, shape ``[batch]``.
        fill: Value of the padding, per channel, shape ``[channels]``.
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device)
    columns = offsets_x.unsqueeze(1) + torch.where(is_flipped.unsqueeze(1), width - 1 - x, x)
    rows = offsets_y.unsqueeze(1) + torch.arange(height, device=images.device)
    return _take(images, columns.unsqueeze(1), rows.unsqueeze(2), fill)


def warp(images: Tensor, maps: Tensor, fill: Tensor) -> Tensor:
    """Return each image with its pixels taken from where its map says: one gather.

    Args:
        images: Shape ``[batch, channels, height, width]``, any dtype.
        maps: Fixed-point maps, int64, shape ``[batch, 6]``.
        fill: Value of pixels that come from outside, per channel, shape ``[channels]``.

    Returns:
        Shape, dtype and device of ``images``.
    """
    height, width = images.shape[-2:]
    # 32 bits do for sides up to 4,096: a coordinate stays below four sides, and 16 bits are its fraction.
    dtype = torch.int32 if max(height, width) <= 4096 else torch.int64
    x = torch.arange(width, device=images.device, dtype=dtype)
    y = torch.arange(height, device=images.device, dtype=dtype).unsqueeze(1)
    a, b, c, d, e, f = maps.to(dtype).view(-1, 6, 1, 1).unbind(1)
    columns = (a * x + (b * y + c)) >> _FRACTION_BITS  # an arithmetic shift: -0.1 is column -1, outside
    rows = (d * x + (e * y + f)) >> _FRACTION_BITS
    return _take(images, columns, rows, fill)


def _take(images: Tensor, columns: Tensor, rows: Tensor, fill: Tensor) -> Tensor:
    """Gather pixels by source column and row: integers that broadcast to ``[batch, height, width]``."""
    channels, height, width = images.shape[1:]
    is_inside = ((columns >= 0) & (columns < width)) & ((rows >= 0) & (rows < height))
    source = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    index = source.to(torch.int64).flatten(1).unsqueeze(1).expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, index).view(images.shape)
    return torch.where(is_inside.unsqueeze(1), moved, fill.view(1, -1, 1, 1))
