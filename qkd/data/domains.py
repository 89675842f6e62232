"""Domains: one data set whose images are rotated, inverted or colored, each image in one way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qkd.data.errors import DataError
from qkd.data.splits import Parts, Split
from qkd.seeding import stream

if TYPE_CHECKING:
    from qkd.config import DataConfig, DomainConfig

QUARTER = 90  # degrees
UNKNOWN = -1  # placeholder for an unknown label


class InDomains(NamedTuple):
    """A data set divided into domains.

    Attributes:
        parts: The training images of the seen domains, and the test images in the unseen one.
        target: The training images of the unseen domain, without labels.
    """

    parts: Parts
    target: Unlabeled


class DomainSplit:
    """A part of a data set whose images are transformed on reading, each according to its domain.

    Args:
        split: The original images.
        domains: The transforms of each domain.
        numbers: The domain of each image: a position in ``domains``, int64, shape ``[n]``.
        channels: Of the transformed images: 3 if any domain, seen or unseen, has a color.
    """

    def __init__(self, split: Split, domains: tuple[DomainConfig, ...], numbers: Tensor, *, channels: int) -> None:
        self.split, self.domains, self.numbers, self.channels = split, domains, numbers, channels
        self.labels, self.decodes = split.labels, split.decodes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.split)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width."""
        return (self.channels, *self.split.image_shape[1:])

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return ``(images, labels)`` of these images on ``device``."""
        images, labels = self.split.batch(indices, device)
        made = images.expand(-1, self.channels, -1, -1).clone()
        numbers = self.numbers[indices.cpu()].to(images.device)
        for number in sorted(set(numbers.tolist())):
            chosen = (numbers == number).nonzero().flatten()
            made[chosen] = changed(images[chosen], self.domains[number], channels=self.channels)
        return made, labels

    def subset(self, indices: Tensor) -> DomainSplit:
        """Return the part with these images, in this order."""
        numbers = self.numbers[indices.cpu()]
        return DomainSplit(self.split.subset(indices), self.domains, numbers, channels=self.channels)

    def to(self, device: torch.device | str) -> DomainSplit:
        """Move what is in memory to ``device``; return itself."""
        self.split = self.split.to(device)
        return self


class Unlabeled:
    """A part of a data set whose labels must not be read: each batch has -1 in their place.

    Args:
        split: The images.
    """

    def __init__(self, split: Split) -> None:
        self._split, self.decodes = split, split.decodes

    @property
    def labels(self) -> Tensor:
        """Raise, because there are no labels.

        Raises:
            DataError: Always.
        """
        raise DataError("the labels of the unseen domain (data.unseen_domain) are not available in training")

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._split)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width."""
        return self._split.image_shape

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return these images on ``device``, and -1 for each of their labels."""
        images = self._split.batch(indices, device)[0]
        return images, torch.full((len(indices),), UNKNOWN, device=images.device)

    def subset(self, indices: Tensor) -> Unlabeled:
        """Return the part with these images, in this order."""
        return Unlabeled(self._split.subset(indices))

    def to(self, device: torch.device | str) -> Unlabeled:
        """Move what is in memory to ``device``; return itself."""
        self._split = self._split.to(device)
        return self


def changed(images: Tensor, domain: DomainConfig, *, channels: int) -> Tensor:
    """Return images as they look in a domain: rotated, then inverted, then colored.

    Args:
        images: uint8, shape ``[n, channels, height, width]``.
        domain: The transforms to apply.
        channels: Of the result: the number that the images have, or 3 for gray images.

    Returns:
        uint8, shape ``[n, channels, height, width]``. Rotations interpolate linearly and round; they are exact for
        180 degrees, and for 90 degrees if the images are square.
    """
    made = turned(images, domain.rotate).expand(-1, channels, -1, -1)
    made = 255 - made if domain.invert else made
    if domain.color is None:
        return made
    factors = torch.tensor(domain.color, dtype=torch.float64, device=images.device).view(1, 3, 1, 1)
    return (made.double() * factors).round().to(torch.uint8)


def turned(images: Tensor, degrees: float) -> Tensor:
    """Return images rotated counterclockwise about their center, on black.

    Args:
        images: uint8, shape ``[n, channels, height, width]``.
        degrees: The angle.

    Returns:
        uint8, same shape.
    """
    quarters, rest = divmod(degrees, QUARTER)
    if rest == 0 and (quarters % 2 == 0 or images.shape[2] == images.shape[3]):
        return torch.rot90(images, int(quarters), (2, 3))
    height, width = images.shape[2:]
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    cosine, sine = angle.cos().item(), angle.sin().item()
    # source position of each pixel, in half sides: x to the right, y downward
    rows = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]
    theta = torch.tensor([rows], dtype=torch.float64, device=images.device)
    grid = functional.affine_grid(theta, [1, 1, height, width], align_corners=False)
    seen = functional.grid_sample(
        images.double(), grid.expand(len(images), -1, -1, -1), mode="bilinear", align_corners=False
    )
    return seen.round().clamp(0, 255).to(torch.uint8)


def divide_domains(parts: Parts, config: DataConfig) -> InDomains:
    """Divide a data set into the domains of a config.

    The domain of each training image is drawn once, independent of its label and of the run's seed. The domains have
    equal sizes, up to one image, and no image is seen in two of them.

    Args:
        parts: The set as read.
        config: A config with ``domains`` and ``unseen_domain``.

    Raises:
        DataError: If the images have two or four channels, or there are fewer training images than domains.
    """
    domains, found = dict(config.domains or {}), parts.train.image_shape[0]
    if len(parts.train) < len(domains):
        raise DataError(f"data.domains: {len(parts.train)} training images are not enough for {len(domains)} domains")
    channels = channels_in(domains, found)
    if channels not in (1, 3) or found not in (1, channels):
        raise DataError(f"data.domains: color needs images with 1 or 3 channels, but these have {found}")
    kinds, unseen = tuple(domains.values()), list(domains).index(str(config.unseen_domain))
    order = torch.randperm(len(parts.train), generator=stream(0, "domains"))
    numbers = torch.empty(len(parts.train), dtype=torch.int64)
    numbers[order] = torch.arange(len(order)) % len(kinds)
    everything = DomainSplit(parts.train, kinds, numbers, channels=channels)
    of_test = torch.full((len(parts.test),), unseen)
    is_val = torch.zeros(len(parts.train), dtype=torch.bool)
    if parts.val_rows is not None:
        is_val[parts.val_rows] = True
    seen = (numbers != unseen).nonzero().flatten()
    made = parts._replace(
        train=everything.subset(seen),
        test=DomainSplit(parts.test, kinds, of_test, channels=channels),
        val_rows=None if parts.val_rows is None else is_val[seen].nonzero().flatten(),
        test_words=f"{parts.test_words}, in the unseen domain {config.unseen_domain}",
    )
    return InDomains(made, Unlabeled(everything.subset(((numbers == unseen) & ~is_val).nonzero().flatten())))


def channels_in(domains: Mapping[str, DomainConfig], channels: int) -> int:
    """Return the number of channels of images in these domains, given the ``channels`` of the set."""
    return 3 if any(domain.color is not None for domain in domains.values()) else channels


def domain_mark(fingerprint: str, config: DataConfig) -> str:
    """Return the fingerprint of a set in the domains of a config, derived from the set's own."""
    told = {name: domain.model_dump(mode="json") for name, domain in (config.domains or {}).items()}
    words = json.dumps([fingerprint, list(told.items()), config.unseen_domain])
    return hashlib.sha256(words.encode()).hexdigest()
