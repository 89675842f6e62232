"""The images that a search trains on and scores by: both from the training images, never a test image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from qkd.config import SearchConfig
from qkd.data import MemorySplit, Split, Splits
from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.seeding import stream


class JoinedSplit:
    """Two parts as one, for parts that cannot share a tensor.

    Args:
        first: Its images come first.
        second: Its images have the same shape.
    """

    def __init__(self, first: Split, second: Split) -> None:
        self.parts = (first, second)
        self.labels = torch.cat([first.labels, second.labels])
        self.decodes = first.decodes or second.decodes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return channels, height and width of its images."""
        return self.parts[0].image_shape

    def batch(self, indices: Tensor, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Return ``(images, labels)`` in the order of ``indices``."""
        indices = indices.cpu()
        border = len(self.parts[0])
        is_second = indices >= border
        order = torch.cat([(~is_second).nonzero().flatten(), is_second.nonzero().flatten()])
        chosen = (indices[~is_second], indices[is_second] - border)
        found = [part.batch(one, device) for part, one in zip(self.parts, chosen, strict=True) if len(one)]
        back = torch.argsort(order).to(found[0][0].device)
        images, labels = (torch.cat(tensors)[back] for tensors in zip(*found, strict=True))
        return images, labels

    def subset(self, indices: Tensor) -> Split:
        """Return a part with these images, those of the first part before those of the second."""
        border, indices = len(self.parts[0]), indices.cpu()
        first, second = (self.parts[0].subset(indices[indices < border]),
                         self.parts[1].subset(indices[indices >= border] - border))  # fmt: skip
        return join(first, second)

    def to(self, device: torch.device | str) -> JoinedSplit:
        """Move what is in memory to ``device``; return itself."""
        self.parts = (self.parts[0].to(device), self.parts[1].to(device))
        return self


def join(first: Split, second: Split) -> Split:
    """Return two parts as one, in the simplest possible form."""
    if not len(first) or not len(second):
        return first if len(first) else second
    if isinstance(first, MemorySplit) and isinstance(second, MemorySplit):
        labels = torch.cat([first.labels, second.labels])
        return MemorySplit(torch.cat([first.images, second.images]), labels.to(first.images.device))
    return JoinedSplit(first, second)


def search_splits(splits: Splits, settings: SearchConfig, *, seed: int) -> Splits:
    """Return the images of a search: ``train`` and ``val`` from the run's training images, ``test`` empty.

    ``train`` is a stratified part of the run's training images. ``val`` is the run's validation part. If more
    images are requested, training images that are not in ``train`` follow; if fewer, a stratified part is taken. Mean
    and standard deviation remain those of the run.

    Args:
        splits: The run's images.
        settings: How many images of each.
        seed: The run's seed.

    Returns:
        The images of the search.

    Raises:
        ValueError: If there are not enough images, no validation images, or a class is left without a training image.

    Note:
        The published split is one random permutation; this one keeps the share of each class.
    """
    generator = stream(seed, "search", "split")
    train, rest = _divide(splits.train, min(settings.train_images, len(splits.train)), generator)
    val = splits.val
    if settings.val_images is not None:
        missing = settings.val_images - len(val)
        if missing > len(rest):
            raise ValueError(
                f"search.val_images: {settings.val_images} are requested, but there are {len(val) + len(rest)}: "
                f"{len(val)} of data.val_fraction and {len(rest)} left by search.train_images; lower one of them"
            )
        val = join(val, _divide(rest, missing, generator)[0]) if missing > 0 else val
        val = _divide(val, settings.val_images, generator)[0] if missing < 0 else val
    if not len(val):
        raise ValueError(
            "a search needs validation images: set search.val_images (taken from the training images) or "
            "data.val_fraction"
        )
    _require_classes(train, splits.train)
    return dataclasses.replace(splits, train=train, val=val, test=splits.train.subset(_none()))


def without_validation(splits: Splits) -> Splits:
    """Return the same images with an empty validation part: all that a training between two scores may see."""
    return dataclasses.replace(splits, val=splits.train.subset(_none()))


def _divide(split: Split, count: int, generator: torch.Generator) -> tuple[Split, Split]:
    if count >= len(split):
        return split, split.subset(_none())
    quotas = stratified_quotas(torch.bincount(split.labels), count)
    taken, rest = take_quotas(split.labels, quotas, generator)
    return split.subset(taken), split.subset(rest)


def _require_classes(train: Split, everything: Split) -> None:
    lost = sorted(_classes(everything.labels.tolist()) - _classes(train.labels.tolist()))
    if lost:
        raise ValueError(
            f"search.train_images: {len(train)} images leave {len(lost)} classes without a training image; raise it"
        )


def _classes(labels: Sequence[int]) -> set[int]:
    return set(labels)


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.int64)
