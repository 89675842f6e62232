"""The batched engine: applies to every image of a batch the operations drawn for it, a few tensor passes in all."""

from __future__ import annotations

import torch
from torch import Tensor

from qkd.agents.blending import recolour, sharpen
from qkd.agents.cutting import cut_out
from qkd.agents.drawing import Drawn, integers, uniform
from qkd.agents.geometry import GEOMETRIC, crop_flip, map_table, warp
from qkd.agents.magnitudes import cutout_pixels, enhance_factor
from qkd.agents.policy import LEVELS, PBA_OPERATIONS
from qkd.agents.tables import (
    FIXED_TABLES,
    autocontrast_tables,
    contrast_tables,
    equalize_tables,
    fixed_table,
    look_up,
)

_FACTORS = tuple(enhance_factor(level) for level in range(LEVELS))


def check_images(images: Tensor) -> None:
    """Raise unless images are a uint8 batch.

    Raises:
        TypeError: If they are not uint8.
        ValueError: If they are not ``[batch, channels, height, width]``.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"agents take uint8 images, got {images.dtype}; augment before normalising")
    if images.dim() != 4:
        raise ValueError(f"agents take images [batch, channels, height, width], got shape {tuple(images.shape)}")


def apply_operations(images: Tensor, drawn: Drawn, generator: torch.Generator, fill: Tensor) -> Tensor:
    """Return images after their operations, round by round: in a round an image has one operation or none.

    Images of a kind of operation go through it together: geometric ones share a gather, point operations share a table
    look-up; colour, sharpness and cut-out follow on their own. Pixels that a geometric operation exposes take ``fill``
    at once, and later operations treat them as any pixel.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        drawn: The operations.
        generator: For signs and cut-out centres; the same number of draws whatever the operations are.
        fill: uint8, shape ``[channels]``, on the images' device.

    Returns:
        uint8, same shape and device; ``images`` are untouched.
    """
    rounds = drawn.kinds.shape[1]
    if rounds == 0 or images.numel() == 0:
        return images
    result = images.clone(memory_format=torch.contiguous_format)
    for kinds, levels in zip(drawn.kinds.unbind(1), drawn.levels.unbind(1), strict=True):
        chances = uniform((3, len(images)), generator).to(images.device)
        _apply_round(result, kinds.to(images.device), levels.to(images.device), chances, fill)
    return result


def finish(
    images: Tensor, generator: torch.Generator, fill: Tensor, *, padding: int, flip: bool, cutout: int
) -> Tensor:
    """Return images after what always comes last: pad and crop at random, mirror half of them, cut a square out.

    Note: the role-kd release draws crop offsets 0..7 of the 0..8 that a padding of 4 allows; we draw all of them. It
    pads with zeros after normalisation, which is the data set's mean, as here.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        generator: Is drawn from for what is switched on.
        fill: uint8, shape ``[channels]``, on the images' device.
        padding: Pixels on each side; 0 is off.
        flip: Mirror left to right with probability 1/2.
        cutout: Side of the square in pixels, centred anywhere in the image, clipped at its border; 0 is off.

    Returns:
        uint8, same shape and device.
    """
    batch, _, height, width = images.shape
    device = images.device
    if padding or flip:
        offsets = integers(2 * padding + 1, (2, batch), generator).to(device) - padding
        is_flipped = (uniform((batch,), generator) < 0.5).to(device) if flip else torch.zeros_like(offsets[0]).bool()
        images = crop_flip(images, offsets[0], offsets[1], is_flipped, fill)
    if cutout:
        x, y = _positions(uniform((2, batch), generator).to(device), height, width)
        images = cut_out(images, torch.full_like(x, cutout), x, y, fill)
    return images


def _apply_round(images: Tensor, kinds: Tensor, levels: Tensor, chances: Tensor, fill: Tensor) -> None:
    """Apply one operation an image, in place. ``chances``: three uniform numbers an image, for sign and centre."""
    height, width = images.shape[-2:]
    device = images.device
    factors = torch.tensor(_FACTORS, device=device)
    rows = _rows_of(kinds, GEOMETRIC)
    if len(rows):
        signs = (chances[0, rows] < 0.5).to(torch.int64)
        maps = map_table(height, width).to(device)[_rank(kinds[rows], GEOMETRIC), levels[rows], signs]
        images.index_copy_(0, rows, warp(images.index_select(0, rows), maps, fill))
    _apply_tables(images, kinds, levels, factors)
    for name, operation in (("Color", recolour), ("Sharpness", sharpen)):
        rows = _rows_of(kinds, (name,))
        if len(rows):
            images.index_copy_(0, rows, operation(images.index_select(0, rows), factors[levels[rows]]))
    rows = _rows_of(kinds, ("Cutout",))
    if len(rows):
        sides = torch.tensor([cutout_pixels(level, min(height, width)) for level in range(LEVELS)], device=device)
        x, y = _positions(chances[1:, rows], height, width)
        images.index_copy_(0, rows, cut_out(images.index_select(0, rows), sides[levels[rows]], x, y, fill))


def _apply_tables(images: Tensor, kinds: Tensor, levels: Tensor, factors: Tensor) -> None:
    """Apply the point operations of a round, in place: each image's table is made, then all are looked up at once."""
    fixed, contrast, equalize, autocontrast = (
        _rows_of(kinds, names) for names in (FIXED_TABLES, ("Contrast",), ("Equalize",), ("AutoContrast",))
    )
    channels, tables = images.shape[1], []
    if len(fixed):
        table = fixed_table().to(images.device)[_rank(kinds[fixed], FIXED_TABLES), levels[fixed]]
        tables.append(table.unsqueeze(1).expand(-1, channels, -1))
    if len(contrast):
        made = contrast_tables(images.index_select(0, contrast), factors[levels[contrast]])
        tables.append(made.expand(-1, channels, -1))
    if len(equalize):
        tables.append(equalize_tables(images.index_select(0, equalize)))
    if len(autocontrast):
        tables.append(autocontrast_tables(images.index_select(0, autocontrast)))
    if tables:
        rows = torch.cat((fixed, contrast, equalize, autocontrast))
        images.index_copy_(0, rows, look_up(images.index_select(0, rows), torch.cat(tables)))


def _rows_of(kinds: Tensor, names: tuple[str, ...]) -> Tensor:
    """Return the positions of the images whose operation is one of ``names``."""
    return (_rank(kinds, names) >= 0).nonzero().flatten()


def _rank(kinds: Tensor, names: tuple[str, ...]) -> Tensor:
    """Return the position in ``names`` of each operation."""
    return _ranks(names, kinds.device)[kinds]


def _ranks(names: tuple[str, ...], device: torch.device) -> Tensor:
    """Return for every operation, and at last for none, its position in ``names`` or -1."""
    ranks = [names.index(name) if name in names else -1 for name in PBA_OPERATIONS]
    return torch.tensor([*ranks, -1], device=device)


def _positions(chances: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return a column and a row of the image from two uniform numbers each."""
    scale = torch.tensor([[width], [height]], device=chances.device)
    # float32 may round a chance just below 1 up to the whole side.
    x, y = torch.minimum((chances * scale).to(torch.int64), scale - 1)
    return x, y
