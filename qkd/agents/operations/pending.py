"""A batch with pending operations: geometric ones as one index map per image, point operations as a table per channel.

Nothing is approximated. Index maps compose by a gather of one from the other, tables likewise; a pixel that a map
exposes points to a slot behind the image's pixels, one slot for each map, whose color goes through the tables that
follow. Pixels themselves move once for the map and once for the table, when they are needed (`settle`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.agents.operations.counting import IntArray
from qkd.agents.operations.rows import put_rows, take_rows, to_device
from qkd.agents.operations.tables import look_up


class PendingBatch:
    """Images with their pending operations. Rows are positions in the batch, each at most once.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``; never written to.
        fill: Of exposed pixels, uint8, shape ``[channels]``, on the images' device.
        most_maps: The largest number of index maps per image between two calls of `settle`.
    """

    def __init__(self, images: Tensor, fill: Tensor, most_maps: int) -> None:
        self._shape = images.shape
        self._pixels = images.flatten(2)
        self._is_own = False
        self._fill = fill
        self._slots = most_maps
        self.maps: IntArray = np.zeros(len(images), dtype=np.int64)  # number pending on each image
        self.has_table: npt.NDArray[np.bool_] = np.zeros(len(images), dtype=bool)
        self._index: Tensor | None = None  # composed maps, int64 [batch, pixels]
        self._colors: Tensor | None = None  # of the slots, uint8 [batch, channels, slots]
        self._tables: Tensor | None = None  # uint8 [batch, channels, 256]

    @property
    def device(self) -> torch.device:
        """Device of the images."""
        return self._fill.device

    @property
    def channels(self) -> int:
        """Number of images."""
        return self._shape[1]

    def images(self) -> Tensor:
        """Return the images after all pending operations: uint8, in their original shape, contiguous."""
        self.settle(np.arange(len(self.maps)))
        return self._pixels.reshape(self._shape)

    def pixels(self, rows: IntArray) -> Tensor:
        """Return the stored images of these rows, without the pending operations."""
        return self._of(self._pixels, rows).view(-1, *self._shape[1:])

    def write(self, rows: IntArray, images: Tensor) -> None:
        """Replace the images of these rows, which must have no pending operations."""
        self._store(rows, images.flatten(2))

    def add_maps(self, rows: IntArray, maps: Tensor) -> None:
        """Queue an index map (see `qkd.agents.operations.geometry`) for each row, after those already pending."""
        places = self._shape[2] * self._shape[3]
        waiting = self.maps[rows]
        if self._colors is None:
            self._colors = self._fill.view(1, -1, 1).repeat(len(self.maps), 1, self._slots)
        if waiting.any():
            maps = self._composed(rows, maps, waiting, places)
        if self._index is None:
            self._index = maps if self._is_all(rows) else maps.new_empty((len(self.maps), places))
        if self._index is not maps:
            put_rows(self._index, rows, maps)
        self.maps[rows] += 1

    def add_tables(self, rows: IntArray, tables: Tensor) -> None:
        """Queue a table, uint8 ``[rows, channels, 256]``, for each row, after those already pending."""
        if self._tables is None:
            self._tables = tables.new_empty((len(self.maps), self._shape[1], 256))
        waiting = self.maps[rows]
        if waiting.any() and self._colors is not None:  # exposed pixels go through it, too; free slots do not
            is_used = to_device(np.arange(self._slots) < waiting[:, None], self.device).unsqueeze(1)
            passed = look_up(self._of(self._colors, rows), tables)
            put_rows(self._colors, rows, torch.where(is_used, passed, self._fill.view(-1, 1)))
        if self.has_table[rows].any():
            tables = look_up(self.tables(rows), tables)
        put_rows(self._tables, rows, tables)
        self.has_table[rows] = True

    def tables(self, rows: IntArray) -> Tensor:
        """Return the pending tables of these rows, or the identity table where there is none."""
        plain = torch.arange(256, dtype=torch.uint8, device=self.device).expand(len(rows), self._shape[1], 256)
        if self._tables is None:
            return plain
        has_one = torch.from_numpy(self.has_table[rows]).to(self.device).view(-1, 1, 1)
        return torch.where(has_one, self._of(self._tables, rows), plain)

    def settle(self, rows: IntArray) -> None:
        """Apply the pending operations of these rows."""
        tabled, mapped = rows[self.has_table[rows]], rows[self.maps[rows] > 0]
        if len(tabled) and self._tables is not None:
            self._store(tabled, look_up(self._of(self._pixels, tabled), self._of(self._tables, tabled)))
            self.has_table[tabled] = False
        if len(mapped) and self._index is not None and self._colors is not None:
            source = torch.cat((self._of(self._pixels, mapped), self._of(self._colors, mapped)), 2)
            index = self._of(self._index, mapped).unsqueeze(1).expand(-1, source.shape[1], -1)
            self._store(mapped, source.gather(2, index))
            put_rows(self._colors, mapped, self._fill.view(-1, 1).expand(len(mapped), -1, self._slots))
            self.maps[mapped] = 0

    def _composed(self, rows: IntArray, maps: Tensor, waiting: IntArray, places: int) -> Tensor:
        """Return maps that apply the pending maps of these rows first; newly exposed pixels get a new slot."""
        is_old = np.nonzero(waiting)[0]
        if self._index is None:
            return maps
        slots = self._at(places + waiting[is_old]).unsqueeze(1)
        before = torch.cat((self._of(self._index, rows[is_old]), slots), 1)
        if len(is_old) == len(rows):
            return before.gather(1, maps)
        put_rows(maps, is_old, before.gather(1, take_rows(maps, is_old)))
        return maps

    def _store(self, rows: IntArray, pixels: Tensor) -> None:
        if self._is_all(rows):
            self._pixels, self._is_own = pixels, True
            return
        if not self._is_own:
            self._pixels, self._is_own = self._pixels.clone(memory_format=torch.contiguous_format), True
        put_rows(self._pixels, rows, pixels)

    def _of(self, values: Tensor, rows: IntArray) -> Tensor:
        return values if self._is_all(rows) else take_rows(values, rows)

    def _is_all(self, rows: IntArray) -> bool:
        return len(rows) == len(self.maps) and bool((np.diff(rows) == 1).all())

    def _at(self, rows: IntArray) -> Tensor:
        return to_device(rows, self.device)
