"""Batches of two domains: labeled images of the seen domains, and as many unlabeled ones of the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor

from qkd.data import Split, Splits, epoch_order, iterate, normalize
from qkd.data.domains import Unlabeled
from qkd.seeding import stream
from qkd.training.job import Batch, Job
from qkd.training.source import ImageSource


@dataclass(frozen=True)
class PairedBatch(Batch):
    """A batch with images of another domain.

    Args:
        target: These images, normalized, float32, shape ``[batch, channels, height, width]``.
    """

    target: Tensor | None = None


def target_of(batch: Batch) -> Tensor:
    """Return a batch's images of the unseen domain.

    Raises:
        ValueError: If it has none.
    """
    found = batch.target if isinstance(batch, PairedBatch) else None
    if found is None:
        raise ValueError("the batch has no images of an unseen domain; student.adaptation needs a PairedSource")
    return found


class PairedSource:
    """Training images with an agent, like any student's, plus images of the unseen domain in each batch.

    The latter are shuffled separately, and all are read before any repeats. The agent augments them like the others.

    Args:
        job: Its images, agent, seed, role and device.

    Raises:
        ValueError: If the images have no unseen domain.
    """

    def __init__(self, job: Job) -> None:
        self._job, self._seen, self._target = job, ImageSource(job), require_target(job.splits)

    @property
    def images(self) -> int:
        """Return how many labeled images an epoch has."""
        return self._seen.images

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch, beginning with step ``first``, of ``size`` images of each domain."""
        seen, target = self._seen.batches(epoch, first, size), self._targets(epoch, first, size)
        for batch, images in zip(seen, target, strict=True):
            yield PairedBatch(**{field.name: getattr(batch, field.name) for field in fields(Batch)}, target=images)

    def _targets(self, epoch: int, first: int, size: int) -> Iterator[Tensor]:
        """Yield the images of the unseen domain of each step."""
        job, steps = self._job, self.images // size
        places = self._places((epoch * steps + first) * size, (epoch + 1) * steps * size)
        part = cast(Split, self._target)  # except for its labels, which batches do not need
        raw = iterate(part, places, size, job.device, drop_last=True, workers=job.data.workers)
        for step, (images, _) in enumerate(raw):
            generator = stream(job.seed, job.role, "augment target", epoch)
            samples = torch.arange(size) + (epoch * steps + first + step) * size  # also tells repeats apart
            seen = job.agent(images, generator=generator, epoch=epoch, samples=samples)
            yield normalize(seen, job.splits.mean, job.splits.std)

    def _places(self, start: int, end: int) -> Tensor:
        """Return which images are read from ``start`` up to ``end`` (exclusive), counted over the whole training."""
        count, job = len(self._target), self._job
        laps = range(start // count, -(-end // count))
        orders = [epoch_order(count, stream(job.seed, job.role, "target order", lap)) for lap in laps]
        places = torch.cat([torch.empty(0, dtype=torch.int64), *orders])
        offset = start // count * count
        return places[start - offset : end - offset]


def require_target(splits: Splits) -> Unlabeled:
    """Return the images of the unseen domain.

    Raises:
        ValueError: If there are none.
    """
    if splits.target is None or not len(splits.target):
        raise ValueError(
            "student.adaptation: the data set has no images of an unseen domain; set data.domains and "
            "data.unseen_domain"
        )
    return splits.target
