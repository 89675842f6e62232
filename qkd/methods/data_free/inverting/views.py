"""Random views of a batch of images, differentiable: shifts, flips and crops drawn with an explicit generator."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rolled(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Return all images rolled by one shift of at most ``most`` pixels each way, as DeepInversion does."""
    down, right = (int(torch.randint(-most, most + 1, (1,), generator=generator)) for _ in range(2))
    return torch.roll(images, (down, right), (2, 3))


def flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images with half of them mirrored left to right."""
    which = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(which.to(images.device)[:, None, None, None], images.flip(3), images)


def shifted(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Return crops of the original size from zero-padded images, at one position per batch."""
    height, width = images.shape[2:]
    top, left = (int(torch.randint(0, 2 * padding + 1, (1,), generator=generator)) for _ in range(2))
    return functional.pad(images, [padding] * 4)[..., top : top + height, left : left + width]


def cropped(images: Tensor, least_area: float, generator: torch.Generator) -> Tensor:
    """Return a crop of random area, resized to the original size (bilinear), at one position per batch."""
    sides = tuple(images.shape[2:])
    area = least_area + (1 - least_area) * float(torch.rand(1, generator=generator))
    height, width = (max(2, round(side * area**0.5)) for side in sides)
    spare = sides[0] - height, sides[1] - width
    top, left = (int(torch.randint(0, most + 1, (1,), generator=generator)) for most in spare)
    part = images[..., top : top + height, left : left + width]
    return functional.interpolate(part, size=sides, mode="bilinear", align_corners=False)
