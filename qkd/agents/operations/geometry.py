"""Geometric operations as index maps: where each pixel of a sample comes from, in Pillow's fixed-point arithmetic.

An index map is int64 of shape ``[maps, height * width]``: the source pixel in row-major order, or ``height * width``
if a pixel comes from outside (an exposed one). Maps compose exactly, by gathering one from the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from qkd.agents.operations.counting import IntArray
from qkd.agents.operations.rows import take_rows, to_device
from qkd.agents.policies.spaces import GEOMETRIC, Space

_FRACTION_BITS = 16  # of Pillow's nearest-neighbor affine transform
_ONE = 1 << _FRACTION_BITS
_KEPT_BYTES = 1 << 24  # tables of all maps are kept up to this size: sides up to about 80


def fixed_point(matrix: Sequence[float]) -> tuple[int, ...]:
    """Return an affine map as Pillow's 16-bit fixed-point integers, sampled at pixel centers.

    Args:
        matrix: ``(a, b, c, d, e, f)``: pixel ``(x, y)`` of the result comes from ``(a x + b y + c, d x + e y + f)``.

    Returns:
        The six integers; the source pixel is ``(a x + b y + c) >> 16``.
    """
    a, b, c, d, e, f = matrix
    centered = (a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5)
    return tuple(math.floor(value * _ONE + 0.5) for value in centered)


def rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Return the affine map that rotates by ``degrees`` counter-clockwise about the center."""
    angle = -math.radians(degrees % 360)
    # 15 digits, as Pillow rounds them, so that right angles are exact.
    cos, sin, minus_sin = round(math.cos(angle), 15), round(math.sin(angle), 15), round(-math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, cos * -x + sin * -y + x, minus_sin, cos, minus_sin * -x + cos * -y + y


def operation_matrix(space: Space, name: str, level: int, *, sign: int, height: int, width: int) -> tuple[float, ...]:
    """Return the affine map of a geometric operation.

    Args:
        space: What the level means.
        name: One of ``GEOMETRIC``.
        level: From 0.
        sign: 1 or -1.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Raises:
        ValueError: If the operation is not geometric.
    """
    if name not in GEOMETRIC:
        raise ValueError(f"not a geometric operation: {name!r}")
    value = space.meaning(name, level, sign, height if name == "TranslateY" else width)
    if name == "Rotate":
        return rotation(value, height, width)
    return {
        "TranslateX": (1, 0, value, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, value),
        "ShearX": (1, value, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, value, 1, 0),
    }[name]


def operation_maps(
    space: Space, operations: IntArray, levels: IntArray, signs: IntArray, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the index map of each sample's geometric operation.

    Args:
        space: What levels mean.
        operations: Positions in ``GEOMETRIC``, shape ``[batch]``.
        levels: Same shape.
        signs: 0 is plus, 1 is minus; same shape.
        size: ``(height, width)``.
        device: Where the maps are wanted.
    """
    height, width = size
    rows = (operations * space.levels + levels) * 2 + signs
    if len(GEOMETRIC) * space.levels * 2 * height * width * 8 <= _KEPT_BYTES:
        return take_rows(_all_operation_maps(space, height, width, device), rows)
    return affine_maps(take_rows(matrix_table(space, height, width), rows).to(device), height, width)


def crop_flip_maps(
    offsets: IntArray, flips: IntArray, padding: int, size: tuple[int, int], device: torch.device
) -> Tensor:
    """Return the index maps of a crop of the padded image, mirrored left to right afterward if requested.

    Args:
        offsets: Column and row of the window's corner in the padded image, 0..2 * padding, shape ``[batch, 2]``.
        flips: 0 or 1, shape ``[batch]``.
        padding: Pixels on each side.
        size: ``(height, width)``.
        device: Where the maps are wanted.
    """
    height, width = size
    choices = 2 * padding + 1
    rows = (flips * choices + offsets[:, 1]) * choices + offsets[:, 0]
    if 2 * choices**2 * height * width * 8 <= _KEPT_BYTES:
        return take_rows(_all_crop_flip_maps(padding, height, width, device), rows)
    return _crop_flip_maps(to_device(rows, device), padding, height, width)


def cut_boxes(sides: IntArray, centers: IntArray) -> IntArray:
    """Return squares around points: columns ``x0`` up to but not ``x1``, rows ``y0`` up to but not ``y1``.

    A square covers columns ``center - side // 2`` to ``center - side // 2 + side - 1``, and rows likewise.

    Args:
        sides: In pixels, shape ``[...]``; 0 covers nothing.
        centers: Column and row, shape ``[..., 2]``.

    Returns:
        ``(x0, x1, y0, y1)``, shape ``[..., 4]``; they can extend beyond the image.
    """
    first = centers - (sides // 2)[..., None]
    end = first + sides[..., None]
    return np.stack((first[..., 0], end[..., 0], first[..., 1], end[..., 1]), axis=-1)


def cut_maps(boxes: IntArray, size: tuple[int, int], device: torch.device) -> Tensor:
    """Return index maps that keep all pixels in place except those of one box per map, which are exposed.

    Args:
        boxes: As `cut_boxes` gives them, shape ``[batch, 4]``.
        size: ``(height, width)``.
        device: Where the maps are wanted.
    """
    height, width = size
    x0, x1, y0, y1 = (to_device(edge, device).view(-1, 1, 1) for edge in np.ascontiguousarray(boxes.T))
    x, y = torch.arange(width, device=device), torch.arange(height, device=device).unsqueeze(1)
    is_cut = ((x >= x0) & (x < x1)) & ((y >= y0) & (y < y1))
    places = torch.arange(height * width, device=device).expand(len(boxes), -1)
    return places.masked_fill(is_cut.flatten(1), height * width)


def affine_maps(maps: Tensor, height: int, width: int) -> Tensor:
    """Return the index maps of fixed-point affine maps.

    Args:
        maps: int64, shape ``[n, 6]``.
        height: In pixels.
        width: In pixels.
    """
    # 32 bits are enough for sides up to 4,096: a coordinate stays below four sides, and 16 bits are its fraction.
    dtype = torch.int32 if max(height, width) <= 4096 else torch.int64
    x = torch.arange(width, device=maps.device, dtype=dtype)
    y = torch.arange(height, device=maps.device, dtype=dtype).unsqueeze(1)
    a, b, c, d, e, f = maps.to(dtype).view(-1, 6, 1, 1).unbind(1)
    columns = (a * x + (b * y + c)).bitwise_right_shift_(_FRACTION_BITS)  # arithmetic: -0.1 is column -1, outside
    rows = (d * x + (e * y + f)).bitwise_right_shift_(_FRACTION_BITS)
    # A sign bit in a coordinate, or in what is left up to the border, says outside.
    outside = (width - 1 - columns).bitwise_or_(columns).bitwise_or_(rows).bitwise_or_(height - 1 - rows)
    places = columns.add_(rows, alpha=width).masked_fill_(outside < 0, height * width)
    return places.to(torch.int64).flatten(1)


@functools.lru_cache(maxsize=16)
def matrix_table(space: Space, height: int, width: int) -> Tensor:
    """Return every geometric operation's fixed-point map: int64, shape ``[operations * levels * signs, 6]``."""
    rows = [
        fixed_point(operation_matrix(space, name, level, sign=sign, height=height, width=width))
        for name in GEOMETRIC
        for level in range(space.levels)
        for sign in (1, -1)
    ]
    return torch.tensor(rows, dtype=torch.int64)


@functools.lru_cache(maxsize=8)
def _all_operation_maps(space: Space, height: int, width: int, device: torch.device) -> Tensor:
    return affine_maps(matrix_table(space, height, width).to(device), height, width)


@functools.lru_cache(maxsize=8)
def _all_crop_flip_maps(padding: int, height: int, width: int, device: torch.device) -> Tensor:
    return _crop_flip_maps(torch.arange(2 * (2 * padding + 1) ** 2, device=device), padding, height, width)


def _crop_flip_maps(numbers: Tensor, padding: int, height: int, width: int) -> Tensor:
    """Return the maps with these numbers: ``(flip * choices + row offset) * choices + column offset``."""
    choices, device = 2 * padding + 1, numbers.device
    x = torch.arange(width, device=device)
    is_flipped = (numbers // choices**2 == 1).unsqueeze(1)
    columns = (numbers % choices - padding).unsqueeze(1) + torch.where(is_flipped, width - 1 - x, x)
    rows = (numbers // choices % choices - padding).unsqueeze(1) + torch.arange(height, device=device)
    outside = ((columns < 0) | (columns >= width)).unsqueeze(1) | ((rows < 0) | (rows >= height)).unsqueeze(2)
    places = rows.unsqueeze(2) * width + columns.unsqueeze(1)
    return places.masked_fill_(outside, height * width).flatten(1)
