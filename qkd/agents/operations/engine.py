"""The batched engine: applies to every image of a batch the operations drawn for it, in a few tensor passes.

On a CPU with a C++ compiler `qkd.agents.operations.native` does the same work, with the same bits, in one call.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.agents.operations import native
from qkd.agents.operations.blending import blend, luminance, mean_gray, smooth
from qkd.agents.operations.counting import FloatArray, IntArray, SampleDraws, Use
from qkd.agents.operations.drawing import Drawn
from qkd.agents.operations.geometry import crop_flip_maps, cut_boxes, cut_maps, matrix_table, operation_maps
from qkd.agents.operations.pending import PendingBatch
from qkd.agents.operations.rows import take_rows, to_device
from qkd.agents.operations.tables import (
    FIXED_TABLES,
    autocontrast_tables,
    equalize_tables,
    fixed_tables,
    histograms,
    move_counts,
    range_of,
)
from qkd.agents.policies.policy import PBA_OPERATIONS
from qkd.agents.policies.spaces import ENHANCING, GEOMETRIC, Space

# A contrast is a table, too, but its mean gray is not known from histograms of the channels.
BLENDING = ("Contrast", "Color", "Sharpness")
COUNTING = ("Equalize", "AutoContrast")  # their tables are made from histograms
CHUNK_PIXELS = 1 << 18  # on a CPU, this many pixels fit in its cache


@dataclass(frozen=True)
class Finish:
    """What comes after the operations, always in this order.

    Note: the role-kd release draws crop offsets 0..7 of the 0..8 that a padding of 4 allows; we draw all of them,
    unless ``leaves_last`` says otherwise. It pads with zeros after normalization, which is the data set's mean, as
    here.

    Args:
        padding: Of a random crop, pixels on each side; 0 is off.
        flip: Mirror left to right with probability 1/2.
        cutout: Side of a square in pixels, centered anywhere in the image, clipped at its border; 0 is off.
        leaves_last: Draw crop offsets as released: never the last.
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0
    leaves_last: bool = False


def check_images(images: Tensor) -> None:
    """Raise unless images are a uint8 batch.

    Raises:
        TypeError: If they are not uint8.
        ValueError: If they are not ``[batch, channels, height, width]``.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"agents take uint8 images, got {images.dtype}; augment before normalizing")
    if images.dim() != 4:
        raise ValueError(f"agents take images [batch, channels, height, width], got shape {tuple(images.shape)}")


def augment(images: Tensor, drawn: Drawn, draws: SampleDraws, fill: Tensor, finish: Finish | None = None) -> Tensor:
    """Return images after their operations in order, and after ``finish``.

    Pixels that a geometric operation or a cut-out exposes get ``fill`` at once, and later operations treat them like
    any other pixel. The result for an image depends only on itself, its operations and its draws.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        drawn: The operations.
        draws: For signs, cut-out centers, crop and flip; of the same images.
        fill: uint8, shape ``[channels]``, on the images' device.
        finish: What comes last; default: nothing.

    Returns:
        uint8, same shape and device; ``images`` are not changed, and are returned if there is nothing to do.
    """
    finish = finish or Finish()
    rounds = drawn.kinds.shape[1]
    if images.numel() == 0 or (rounds == 0 and finish == Finish()):
        return images
    chances = draws.uniform(Use.CENTERS, 2 * rounds).reshape(len(images), rounds, 2)
    ending = _Ending.draw(finish, draws, images.shape[-2:])
    signs = draws.integers(2, Use.SIGNS, rounds)
    if images.device.type == "cpu" and native.load() is not None:
        return _compiled(images, fill, drawn, signs, chances, ending)
    step = max(1, CHUNK_PIXELS // images[0, 0].numel()) if images.device.type == "cpu" else len(images)
    parts = []
    for start in range(0, len(images), step):
        rows = slice(start, start + step)
        batch = PendingBatch(images[rows], fill, rounds + 2)
        for index in range(rounds):
            choice = (drawn.kinds[rows, index], drawn.levels[rows, index], signs[rows, index], chances[rows, index])
            _Round(batch, images.shape[-2:], drawn.space, *choice).apply()
        ending.apply(batch, rows, images.shape[-2:])
        parts.append(batch.images())
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _compiled(
    images: Tensor, fill: Tensor, drawn: Drawn, signs: IntArray, chances: FloatArray, ending: _Ending
) -> Tensor:
    """Return the same as the batched engine, computed by the compiled function."""
    space, kinds, levels = drawn.space, drawn.kinds, drawn.levels
    batch, height, width = len(images), *images.shape[-2:]
    codes = _codes()[kinds]
    geometric, fixed, enhancing = (_ranks(names)[kinds].clip(0) for names in (GEOMETRIC, FIXED_TABLES, ENHANCING))
    boxes = np.zeros((batch, kinds.shape[1] + 1, 4), dtype=np.int64)
    if "Cutout" in space.operations:
        boxes[:, :-1] = cut_boxes(_sides(space, min(height, width))[levels], _positions(chances, height, width))
    finish = ending.finish
    if finish.cutout:
        boxes[:, -1] = cut_boxes(np.full(batch, finish.cutout), ending.centers)
    windows = np.column_stack((ending.offsets - finish.padding, ending.flips))
    return native.run(
        images,
        fill,
        codes,
        matrix_table(space, height, width).numpy()[(geometric * space.levels + levels) * 2 + signs],
        _factors(space)[enhancing, levels, signs],
        fixed_tables(space, images.device),
        (fixed * space.levels + levels) * 2 + signs,
        boxes,
        windows if finish.padding or finish.flip else None,
        has_cut=finish.cutout > 0,
    )


@dataclass(frozen=True)
class _Round:
    """One operation or none for each image; arrays of shape ``[batch]``, but ``chances`` ``[batch, 2]``."""

    batch: PendingBatch
    size: tuple[int, ...]
    space: Space
    kinds: IntArray
    levels: IntArray
    signs: IntArray
    chances: FloatArray

    def apply(self) -> None:
        self._geometric()
        self._cut()
        self._settle()
        self._tables()
        self._blend()

    def _geometric(self) -> None:
        rows = self._rows(GEOMETRIC)
        if len(rows):
            operations = _ranks(GEOMETRIC)[self.kinds[rows]]
            device = self.batch.device
            size = self.size[0], self.size[1]
            maps = operation_maps(self.space, operations, self.levels[rows], self.signs[rows], size, device)
            self.batch.add_maps(rows, maps)

    def _cut(self) -> None:
        rows = self._rows(("Cutout",))
        if len(rows):
            height, width = self.size
            sides = _sides(self.space, min(height, width))[self.levels[rows]]
            boxes = cut_boxes(sides, _positions(self.chances[rows], height, width))
            self.batch.add_maps(rows, cut_maps(boxes, (height, width), self.batch.device))

    def _settle(self) -> None:
        """Bring those up to date whose operation needs their pixels: blended ones, and tables made from pixels."""
        needs = self._is_any(BLENDING) & ((self.batch.maps > 0) | self.batch.has_table)
        rows = np.nonzero(needs | (self._is_any(COUNTING) & (self.batch.maps > 0)))[0]
        if len(rows):
            self.batch.settle(rows)

    def _tables(self) -> None:
        """Let the tables of this round's point operations wait, all at once."""
        fixed, equalize, autocontrast = (
            self._rows(names) for names in (FIXED_TABLES, ("Equalize",), ("AutoContrast",))
        )
        tables = [self._fixed(fixed)] if len(fixed) else []
        rows = np.concatenate((equalize, autocontrast))
        if len(rows):
            counts = histograms(self.batch.pixels(rows))
            if self.batch.has_table[rows].any():  # exact, without moving a pixel
                counts = move_counts(counts, self.batch.tables(rows))
            tables.append(equalize_tables(counts[: len(equalize)]))
            tables.append(autocontrast_tables(*range_of(counts[len(equalize) :])))
        if tables:
            self.batch.add_tables(np.concatenate((fixed, rows)), torch.cat(tables))

    def _fixed(self, rows: IntArray) -> Tensor:
        tables = fixed_tables(self.space, self.batch.device)
        place = (_ranks(FIXED_TABLES)[self.kinds[rows]], self.levels[rows], self.signs[rows])
        flat = (place[0] * self.space.levels + place[1]) * 2 + place[2]
        return take_rows(tables.view(-1, 1, 256), flat).expand(-1, self.batch.channels, -1)

    def _blend(self) -> None:
        """Mix each image with a degenerate one: their mean gray, their gray, or their smoothed selves."""
        found = [self._rows((name,)) for name in BLENDING]
        rows = np.concatenate(found)
        if not len(rows):
            return
        ranks = _ranks(ENHANCING)[self.kinds[rows]]
        factors = to_device(_factors(self.space)[ranks, self.levels[rows], self.signs[rows]], self.batch.device)
        values = self.batch.pixels(rows).to(torch.float32)
        contrast, gray = len(found[0]), len(found[0]) + len(found[1])
        base = torch.empty_like(values)
        if gray:
            light = luminance(values[:gray])
            base[:contrast] = mean_gray(light[:contrast])
            # Pillow leaves gray images alone, and so does mixing them with themselves.
            base[contrast:gray] = light[contrast:]
        if gray < len(rows):
            smooth(values[gray:], base[gray:])
        self.batch.write(rows, blend(base, values, factors.view(-1, 1, 1, 1)))

    def _rows(self, names: tuple[str, ...]) -> IntArray:
        return np.nonzero(self._is_any(names))[0]

    def _is_any(self, names: tuple[str, ...]) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = _ranks(names)[self.kinds] >= 0
        return chosen


@dataclass(frozen=True)
class _Ending:
    """The draws of a `Finish`: all arrays of shape ``[batch, ...]``."""

    finish: Finish
    offsets: IntArray
    flips: IntArray
    centers: IntArray

    @classmethod
    def draw(cls, finish: Finish, draws: SampleDraws, size: tuple[int, ...]) -> _Ending:
        choices = 2 * finish.padding + (0 if finish.leaves_last else 1)
        offsets = draws.integers(choices, Use.CROP, 2 if finish.padding else 0)
        flips = draws.integers(2, Use.FLIP, 1)[:, 0] * int(finish.flip)
        return cls(
            finish,
            offsets if finish.padding else np.zeros((len(draws), 2), np.int64),
            flips,
            _positions(draws.uniform(Use.CUTOUT, 2 if finish.cutout else 0), size[0], size[1]),
        )

    def apply(self, batch: PendingBatch, rows: slice, size: tuple[int, ...]) -> None:
        everyone = np.arange(len(batch.maps))
        shape = size[0], size[1]
        if self.finish.padding or self.finish.flip:
            offsets, flips = self.offsets[rows], self.flips[rows]
            batch.add_maps(everyone, crop_flip_maps(offsets, flips, self.finish.padding, shape, batch.device))
        if self.finish.cutout:
            boxes = cut_boxes(np.full(len(everyone), self.finish.cutout), self.centers[rows])
            batch.add_maps(everyone, cut_maps(boxes, shape, batch.device))


@functools.lru_cache(maxsize=64)
def _ranks(names: tuple[str, ...]) -> IntArray:
    """Return for every operation, and at last for none, its position in ``names`` or -1."""
    return np.array([*(names.index(name) if name in names else -1 for name in PBA_OPERATIONS), -1], dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _codes() -> IntArray:
    """Return for every operation, and at last for none, its code in the compiled source."""
    named = dict.fromkeys(GEOMETRIC, native.AFFINE) | dict.fromkeys(FIXED_TABLES, native.TABLE)
    named |= {"Cutout": native.CUT, "Equalize": native.EQUALIZE, "AutoContrast": native.AUTOCONTRAST}
    named |= {"Contrast": native.CONTRAST, "Color": native.COLOR, "Sharpness": native.SHARPNESS}
    return np.array([*(named[name] for name in PBA_OPERATIONS), native.NOTHING], dtype=np.int64)


@functools.lru_cache(maxsize=16)
def _sides(space: Space, side: int) -> IntArray:
    """Return the side of the square that a cut-out takes at every level."""
    return np.array([int(space.meaning("Cutout", level, 1, side)) for level in range(space.levels)], dtype=np.int64)


@functools.lru_cache(maxsize=8)
def _factors(space: Space) -> npt.NDArray[np.float32]:
    """Return the factors of ``ENHANCING`` at every level and sign, float32, ``[operation, level, sign]``."""
    rows = [[[space.meaning(name, level, sign, 0) for sign in (1, -1)] for level in range(space.levels)]
            for name in ENHANCING]  # fmt: skip
    return np.array(rows, dtype=np.float32)


def _positions(chances: FloatArray, height: int, width: int) -> IntArray:
    """Return a column and a row of the image from two numbers in [0, 1) each."""
    scaled: IntArray = (chances * np.array([width, height])[: chances.shape[-1]]).astype(np.int64)
    return scaled
