"""Parts in memory or in rows of a file, with their images in another size or number of channels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from qkd.data.errors import DataError
from qkd.data.sets.archive import IN_MEMORY_BYTES
from qkd.data.sets.fitting import Fit
from qkd.data.sets.images import MOST_PIXELS, fit_into, sizes_between
from qkd.data.sets.rows import ArraySplit, Bytes, HeldRows, Rows
from qkd.data.splits import Parts, Split
from qkd.image_size import ImageSize, height_width


class ResizedRows:
    """Images of a set, resized whenever they are taken, by the same code as the files of a folder.

    Args:
        rows: The original images.
        wanted: Channels (1 or 3), height and width.
        fit: How an image is resized.
    """

    decodes = True

    def __init__(self, rows: Rows, wanted: tuple[int, int, int], fit: Fit) -> None:
        self.rows, self.wanted, self.fit = rows, wanted, fit
        channels, height, width = wanted
        self.shape: tuple[int, ...] = (rows.shape[0], height, width, channels)

    def take(self, rows: npt.NDArray[np.int64]) -> Bytes:
        """Return a resized copy of these images, in this order."""
        made = torch.empty((len(rows), *self.wanted), dtype=torch.uint8)
        for out, image in zip(made, self.rows.take(rows), strict=True):
            pixels = np.ascontiguousarray(image)
            fit_into(out, gray(pixels) if self.wanted[0] == 1 else pixels, self.fit)
        return np.moveaxis(made.numpy(), 1, -1)


def resize_parts(parts: Parts, *, channels: int, image_size: ImageSize, fit: Fit) -> Parts:
    """Return the parts of a data set with their images converted to another form.

    A part that takes at most 64 MiB then is converted once and kept in memory; a larger one is converted as batches
    read it.

    Args:
        parts: Parts in memory or in rows of a file.
        channels: Of the result: 1 (gray) or 3 (color).
        image_size: Of the result, in pixels.
        fit: How images are resized.

    Returns:
        The same parts with the converted images.

    Raises:
        DataError: If an image would have more pixels on the way than an image file may have.
    """
    wanted = channels, *height_width(image_size)
    train, test = (_resized(part, wanted, fit) for part in (parts.train, parts.test))
    return parts._replace(train=train, test=test)


def _resized(part: Split, wanted: tuple[int, int, int], fit: Fit) -> Split:
    held = _in_rows(part)
    _refuse_large(held.source.shape[1:3], wanted, fit)
    made = ArraySplit(ResizedRows(held.source, wanted, fit), held.labels, held.rows)
    is_small = len(held) * int(np.prod(wanted)) <= IN_MEMORY_BYTES
    return made.gathered(torch.device("cpu")) if is_small else made


def _in_rows(part: Split) -> ArraySplit:
    if isinstance(part, ArraySplit):
        return part
    images, labels = part.batch(torch.arange(len(part)), "cpu")
    return ArraySplit(HeldRows(images.permute(0, 2, 3, 1).numpy()), labels)


def gray(pixels: Bytes) -> Bytes:
    """Return the gray values of an image ``[height, width(, 1 or 3)]``, weighted as Pillow does for files."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _refuse_large(found: tuple[int, ...], wanted: tuple[int, int, int], fit: Fit) -> None:
    for width, height in sizes_between((found[1], found[0]), (wanted[2], wanted[1]), fit):
        if width * height > MOST_PIXELS:
            raise DataError(
                f"data.image_size: images of {found[0]}x{found[1]} would be resized to {height:,}x{width:,} pixels, "
                f"more than the limit of {MOST_PIXELS:,}; set a smaller size, or resize: stretch"
            )
