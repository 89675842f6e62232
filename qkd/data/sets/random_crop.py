"""Training images in files: a random crop of each, new in every epoch, optionally decoded at a reduced scale."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qkd.data.sets.folder import FolderSplit
from qkd.data.sets.images import Piece, decode_into

ATTEMPTS = 10  # to draw a crop that fits into the image
Box = tuple[int, int, int, int]  # left, top, width, height
Numbers = Callable[[Tensor, int], Sequence[Sequence[float]]]
"""Returns that many numbers in [0, 1) for each of some positions in the data set; must be picklable."""


@dataclass(frozen=True)
class RandomCrop:
    """A random crop: a share of the image's area with a random aspect ratio, at a random position.

    Args:
        area: Smallest and largest share of the image's area, uniform.
        ratio: Smallest and largest ratio of width to height, log-uniform.

    References:
        Szegedy et al., `Going Deeper with Convolutions <https://arxiv.org/abs/1409.4842>`_, 2015, section 6.

    Note: ten attempts and the center after them, as torchvision's ``RandomResizedCrop``.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def box(self, size: tuple[int, int], attempts: Sequence[Sequence[float]]) -> Box:
        """Return the crop of an image for some random numbers.

        Args:
            size: Width and height of the image, in pixels.
            attempts: Per attempt, the area, ratio, left and top as numbers in [0, 1).

        Returns:
            ``(left, top, width, height)``, within the image. If no attempt fits, the largest center crop with an
            allowed aspect ratio.
        """
        narrow, broad = (math.log(value) for value in self.ratio)
        for area, ratio, left, top in attempts:
            share = size[0] * size[1] * (self.area[0] + area * (self.area[1] - self.area[0]))
            proportion = math.exp(narrow + ratio * (broad - narrow))
            width, height = round(math.sqrt(share * proportion)), round(math.sqrt(share / proportion))
            if 0 < width <= size[0] and 0 < height <= size[1]:
                return int(left * (size[0] - width + 1)), int(top * (size[1] - height + 1)), width, height
        width = max(1, min(size[0], round(size[1] * self.ratio[1])))
        height = max(1, min(size[1], round(size[0] / self.ratio[0])))
        return (size[0] - width) // 2, (size[1] - height) // 2, width, height


class TrainingFolder:
    """The images of a folder, cropped for training.

    Args:
        whole: The folder's part.
        crop: How crops are drawn; None for whole images. A crop depends only on the numbers of its position.
        numbers: The random numbers of an epoch.
        is_reduced: Whether JPEG files are decoded at a reduced scale if that is large enough.
    """

    decodes = True

    def __init__(
        self, whole: FolderSplit, crop: RandomCrop | None, numbers: Numbers, *, is_reduced: bool = False
    ) -> None:
        self.whole = whole
        self.labels = whole.labels
        self._crop = crop
        self._numbers = numbers
        self._is_reduced = is_reduced

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.whole)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of its images."""
        return self.whole.image_shape

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Decode these images: uint8 ``[batch, channels, height, width]`` and labels int64 ``[batch]``.

        Raises:
            DataError: If a file cannot be decoded; the message names it.
        """
        indices, whole = indices.cpu(), self.whole
        images = torch.empty((len(indices), *self.image_shape), dtype=torch.uint8)
        pieces = self._pieces(indices)
        for row, index in enumerate(indices.tolist()):
            decode_into(images[row], whole.files[index], whole.fit, pieces[row], is_reduced=self._is_reduced)
        return images.to(device, non_blocking=True), self.labels[indices].to(device, non_blocking=True)

    def _pieces(self, indices: Tensor) -> Sequence[Piece | None]:
        if self._crop is None:
            return [None] * len(indices)
        numbers = self._numbers(indices, 4 * ATTEMPTS)
        attempts = [[row[start : start + 4] for start in range(0, 4 * ATTEMPTS, 4)] for row in numbers]
        return [functools.partial(self._crop.box, attempts=one) for one in attempts]

    def subset(self, indices: Tensor) -> FolderSplit:
        """Return the part with these images, in this order, uncropped."""
        return self.whole.subset(indices)

    def to(self, device: torch.device | str) -> TrainingFolder:  # noqa: ARG002
        """Return itself, since files do not move."""
        return self
