"""Changes to made images before a student sees them: procedural images are added, and some are put into boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qkd.config.data_free import DataFreeConfig
from qkd.data import Splits
from qkd.methods.data_free.making.procedural import Procedural
from qkd.methods.method import Synthesis

SHRINKS = (-0.2, 1.1)  # natural logarithm of the factor by which a side shrinks: 0.8 to 3
TILT, SHIFT = 0.3, 0.3  # limits: radians, and halves of a side


@dataclass(frozen=True)
class Arrangement:
    """How a batch is put together.

    Args:
        procedural: Makes the images to add; None if there are none.
        share: Their share of a batch.
        boxed: Probability that an image is put into a box.
        mean: Per channel, fractions of the full range.
        std: Likewise.
    """

    procedural: Procedural | None
    share: float
    boxed: float
    mean: Sequence[float]
    std: Sequence[float]

    @property
    def is_idle(self) -> bool:
        """Return whether it leaves batches unchanged."""
        return self.procedural is None and self.boxed == 0

    def made(self, count: int) -> int:
        """Return how many of a batch the method makes: at least one, and at most all but one if others are added."""
        if self.procedural is None:
            return count
        return max(1, min(count - 1, count - round(self.share * count)))

    def __call__(
        self, images: Tensor, labels: Tensor | None, count: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Return a batch, and the classes if they are still known: not if images were added or changed.

        Args:
            images: Normalized, shape ``[made, channels, height, width]``.
            labels: Shape ``[made]``; None if no class was requested.
            count: Images of the batch.
            generator: For the random numbers.
        """
        if self.is_idle:
            return images, labels
        if self.procedural is not None and count > len(images):
            images = torch.cat([images, self.procedural.draw(count - len(images), generator)[0]])
        return self._partly_boxed(images, generator) if self.boxed else images, None

    def _partly_boxed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        chosen = (torch.rand(len(images), generator=generator) < self.boxed).to(images.device)
        pixels = in_boxes((images * std + mean).clamp(0, 1), generator)
        return torch.where(chosen[:, None, None, None], (pixels - mean) / std, images)


class Arranged:
    """Images of a synthesis, arranged.

    Args:
        synthesis: Makes images.
        arrangement: Arrangement of its images.
    """

    def __init__(self, synthesis: Synthesis, arrangement: Arrangement) -> None:
        self._synthesis, self._arrangement = synthesis, arrangement

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return images, and the classes if they are still known."""
        images, labels = self._synthesis.draw(self._arrangement.made(count), generator)
        return self._arrangement(images, labels, count, generator)


def arrangement_of(settings: DataFreeConfig, splits: Splits, device: torch.device) -> Arrangement:
    """Return the arrangement of made images for a config.

    Args:
        settings: The section of the config.
        splits: Shape of the images, mean and standard deviation.
        device: The device of the images.
    """
    kinds, mean, std = settings.procedural_kinds, splits.mean, splits.std
    joins = Procedural(splits.image_shape, kinds, mean, std, device) if settings.procedural_share else None
    return Arrangement(joins, settings.procedural_share, settings.boxed, mean, std)


def in_boxes(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return images on black, each with random size, aspect ratio, tilt and position; parts outside are cut off.

    Args:
        pixels: Fractions of the full range, shape ``[batch, channels, height, width]``.
        generator: For the random numbers.
    """
    count = len(pixels)
    across, down = (torch.empty(count).uniform_(*SHRINKS, generator=generator).exp() for _ in range(2))
    tilt = torch.empty(count).uniform_(-TILT, TILT, generator=generator)
    right, below = torch.empty(2, count).uniform_(-SHIFT, SHIFT, generator=generator)
    rows = (
        torch.stack([across * tilt.cos(), -across * tilt.sin(), right], 1),
        torch.stack([down * tilt.sin(), down * tilt.cos(), below], 1),
    )
    places = torch.stack(rows, 1).to(pixels)
    grid = functional.affine_grid(places, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, align_corners=False)
