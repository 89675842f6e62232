"""Parts whose images are in one large array, in memory or in a file, copied one batch at a time."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.splits import MemorySplit, Split

Bytes = npt.NDArray[np.uint8]
_MOVED_AT_ONCE = 1 << 24  # bytes of a large set on their way to another device


class Rows(Protocol):
    """Images of a set, uint8, ``[n, height, width]`` or ``[n, height, width, channels]``."""

    shape: tuple[int, ...]
    decodes: bool

    def take(self, rows: npt.NDArray[np.int64]) -> Bytes:
        """Return a copy of these images, in this order."""
        ...


class HeldRows:
    """Images in memory, with whatever memory layout their array has.

    Args:
        array: uint8, as in :class:`Rows`.
    """

    decodes = False

    def __init__(self, array: Bytes) -> None:
        self.shape: tuple[int, ...] = array.shape
        self._array = array

    def take(self, rows: npt.NDArray[np.int64]) -> Bytes:
        """Return a copy of these images, in this order."""
        return self._array[rows]


class StoredRows:
    """Images that stay in their file: each batch reads its own.

    The file is read, not memory-mapped: with a mapping, every page that was read would count as memory of this process,
    and the process would be killed if the file were truncated.

    Args:
        path: The file.
        offset: Offset of the first pixel in bytes.
        shape: As in :class:`Rows`.

    Raises:
        OSError: If the file cannot be opened.
    """

    decodes = False

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._path, self._offset = path, offset
        self._image_bytes = int(np.prod(shape[1:], dtype=np.int64))
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._handle)
        self._opened = self._state()

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process open the file by itself."""
        return _reopened, (self._path, self._offset, self.shape, self._opened)

    def take(self, rows: npt.NDArray[np.int64]) -> Bytes:
        """Return a copy of these images, in this order.

        Raises:
            DataError: If the file was written to since it was opened.
        """
        if self._state() != self._opened:
            raise DataError(f"{self._path}: was modified while it was in use; run the command again")
        images = np.empty((len(rows), *self.shape[1:]), np.uint8)
        flat = images.reshape(len(rows), -1)
        if len(rows) and bool((np.diff(rows) == 1).all()):
            self._read(int(rows[0]), flat.reshape(-1).data)
            return images
        for place, row in zip(flat, rows.tolist(), strict=True):
            self._read(row, place.data)
        return images

    def each_block(self, use: Callable[[memoryview], object], block_bytes: int = 1 << 20) -> None:
        """Call ``use`` with all pixels in file order, one megabyte at a time."""
        buffer = memoryview(bytearray(block_bytes))
        left, at = self._image_bytes * self.shape[0], self._offset
        while left:
            block = buffer[: min(left, block_bytes)]
            self._fill(block, at)
            use(block)
            left, at = left - len(block), at + len(block)

    def _read(self, row: int, into: memoryview) -> None:
        self._fill(into, self._offset + row * self._image_bytes)

    def _fill(self, into: memoryview, at: int) -> None:
        while into:
            count = os.preadv(self._handle, [into], at)
            if not count:
                raise DataError(f"{self._path}: is truncated before its last image; write it again with numpy.savez")
            into, at = into[count:], at + count

    def _state(self) -> tuple[int, int]:
        facts = os.fstat(self._handle)
        return facts.st_size, facts.st_mtime_ns


def _reopened(path: Path, offset: int, shape: tuple[int, ...], opened: tuple[int, int]) -> StoredRows:
    rows = StoredRows(path, offset, shape)
    rows._opened = opened
    return rows


class ArraySplit:
    """A part that consists of some rows of a large array, which its own parts share.

    Args:
        source: The array.
        labels: Of the chosen rows, int64, shape ``[n]``.
        rows: Chosen rows, int64, shape ``[n]``; None for all.
    """

    def __init__(self, source: Rows, labels: Tensor, rows: Tensor | None = None) -> None:
        self.source, self.labels, self.decodes = source, labels, source.decodes
        self.rows = torch.arange(source.shape[0]) if rows is None else rows
        if self.labels.shape != self.rows.shape:
            raise ValueError(f"needs one label per row, got {tuple(labels.shape)} for {tuple(self.rows.shape)}")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of its images."""
        channels, height, width = self.pixels(torch.zeros(1, dtype=torch.int64)).shape[1:]
        return channels, height, width

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return ``(images, labels)``: uint8 ``[batch, channels, height, width]`` and int64 ``[batch]``.

        Raises:
            DataError: If the file with the images was modified.
        """
        indices = indices.cpu()
        images = self.pixels(indices)
        return images.to(device, non_blocking=True), self.labels[indices].to(device, non_blocking=True)

    def pixels(self, indices: Tensor) -> Tensor:
        """Return these images on the CPU: uint8 ``[batch, channels, height, width]``.

        Raises:
            DataError: If the file with the images was modified.
        """
        return torch.from_numpy(channels_first(self.source.take(self.rows[indices].numpy())))

    def subset(self, indices: Tensor) -> ArraySplit:
        """Return the part with these images, in this order."""
        indices = indices.cpu()
        return ArraySplit(self.source, self.labels[indices], self.rows[indices])

    def to(self, device: torch.device | str) -> Split:
        """Return itself, or its images on the device if they take at most half of its free memory."""
        target = torch.device(device)
        size = len(self) * int(np.prod(self.source.shape[1:], dtype=np.int64))
        if target.type == "cpu" or (target.type == "cuda" and size > torch.cuda.mem_get_info(target)[0] // 2):
            return self
        return self.gathered(target)

    def gathered(self, target: torch.device) -> MemorySplit:
        """Return a part with these images in the memory of a device."""
        first = self.batch(torch.arange(min(1, len(self))), "cpu")[0]
        images = torch.empty((len(self), *first.shape[1:]), dtype=torch.uint8, device=target)
        step = max(1, _MOVED_AT_ONCE // max(1, first[0].numel())) if len(self) else 1
        for chunk in torch.split(torch.arange(len(self)), step) if len(self) else ():
            images[chunk[0] : chunk[-1] + 1] = self.batch(chunk, target)[0]
        return MemorySplit(images, self.labels.to(target))


def channels_first(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return images ``[n, height, width]`` or ``[n, height, width, channels]`` as ``[n, channels, height, width]``."""
    moved = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
    return np.ascontiguousarray(moved)
