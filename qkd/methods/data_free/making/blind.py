"""The images of a run as a data-free student may use them: none; test images score it when it is trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkd.data import Splits


class RealImageError(RuntimeError):
    """A real image was asked for where a training is data-free."""


class NoImages:
    """A part of a data set that gives no image.

    Args:
        count: How many images it says it has.
        shape: Channels, height and width.
    """

    decodes = False

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        self.labels = torch.zeros(count, dtype=torch.int64)
        self._shape = shape

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width."""
        return self._shape

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Raise.

        Raises:
            RealImageError: Always.
        """
        raise RealImageError(
            f"the run is data-free (student.data_free), but {len(indices)} real images were asked for: what asks "
            f"must take images of the data-free source"
        )

    def subset(self, indices: Tensor) -> NoImages:
        """Return as many images that it does not give."""
        return NoImages(len(indices), self._shape)

    def to(self, device: torch.device | str) -> NoImages:  # noqa: ARG002
        """Return itself."""
        return self


def blind(splits: Splits) -> Splits:
    """Return a data set without training and validation images: the shape, the classes, the test images."""
    shape = splits.image_shape
    return replace(splits, train=NoImages(len(splits.train), shape), val=NoImages(0, shape), quiz=None, target=None)


def sightless(splits: Splits) -> Splits:
    """Return a data set without any image at all, test images included: for what is made before the student."""
    shape = splits.image_shape
    none = NoImages(0, shape)
    return replace(splits, train=NoImages(len(splits.train), shape), val=none, test=none, quiz=None, target=None)
