"""The images that a data-free student is allowed to use: none, except test images to score it after training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkd.data import Splits


class RealImageError(RuntimeError):
    """A real image was requested in a data-free training."""


class NoImages:
    """A split of a data set that never gives an image.

    Args:
        count: Number of images that it reports.
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
            f"the run is data-free (student.data_free), but {len(indices)} real images were requested; the caller "
            f"must use images from the data-free source"
        )

    def subset(self, indices: Tensor) -> NoImages:
        """Return a split of as many unavailable images."""
        return NoImages(len(indices), self._shape)

    def to(self, device: torch.device | str) -> NoImages:  # noqa: ARG002
        """Return itself."""
        return self


def blind(splits: Splits) -> Splits:
    """Return a data set without training and validation images: the shape, the classes, the test images."""
    shape = splits.image_shape
    return replace(splits, train=NoImages(len(splits.train), shape), val=NoImages(0, shape), quiz=None, target=None)


def sightless(splits: Splits) -> Splits:
    """Return a data set without any images, even test images: for whatever is made before the student."""
    shape = splits.image_shape
    none = NoImages(0, shape)
    return replace(splits, train=NoImages(len(splits.train), shape), val=none, test=none, quiz=None, target=None)
