"""Sources of training batches: images with an agent, or whatever a job uses instead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qkd.agents.operations.counting import SampleDraws, Use
from qkd.data import Split, epoch_order, iterate, normalize
from qkd.data.sets import FolderSplit
from qkd.data.sets.random_crop import RandomCrop, TrainingFolder
from qkd.engines.engine import current
from qkd.seeding import derive, stream
from qkd.training.job import Batch, Job, Source


def source_of(job: Job) -> Source:
    """Return the source of a job's batches: a custom one, or its training images with its agent."""
    if job.source is None:
        return ImageSource(job)
    return job.source(job) if current().size == 1 else SharedSource(job.source(job))


class SharedSource:
    """This process's rows of batches that every process has in full.

    Args:
        source: Yields the same batches in all processes.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def images(self) -> int:
        """Return how many images an epoch has."""
        return self._source.images

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield this process's rows of the full batches of an epoch."""
        for batch in self._source.batches(epoch, first, size):
            yield batch.rows(current().share(len(batch.labels)))


class ImageSource:
    """Training images, in a separate order for each epoch, augmented and normalized.

    An augmented image depends on seed, role, epoch and position in the data set, but not on its batch or on which of
    several devices trains on it.

    Args:
        job: Its images, agent, seed, role and device.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def images(self) -> int:
        """Return how many images an epoch has."""
        return len(self._job.splits.train)

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch; if several devices train, this process's rows of each.

        Args:
            epoch: From 0.
            first: First step, from 0.
            size: Images per batch, positive, over all devices.
        """
        job, more = self._job, self._job.agent.following
        order = epoch_order(self.images, stream(job.seed, job.role, "order", epoch))
        end, part = self.images // size * size, current().share(size)
        rest = torch.cat([order, order[:more]])[first * size : end + more]  # the first follow the last
        batches = iterate(
            _shown(job, epoch), rest, size, job.device, drop_last=True, workers=job.data.workers, following=more,
            part=part,
        )  # fmt: skip
        for step, given in enumerate(_with_places(batches, rest, size, more, part), first):
            yield self._augmented(*given, epoch, step, part.stop - part.start)

    def _augmented(self, images: Tensor, labels: Tensor, samples: Tensor, epoch: int, step: int, size: int) -> Batch:
        job = self._job
        generator = stream(job.seed, job.role, "augment", epoch)
        augmented, mixed = job.agent.with_labels(images, labels, generator=generator, epoch=epoch, samples=samples)
        shown = normalize(augmented[:size], job.splits.mean, job.splits.std)  # the extra images have given their pixels
        second = None if mixed is None else mixed.first(size)
        return Batch(shown, labels[:size], images[:size], epoch, step, samples[:size], second)


def _shown(job: Job, epoch: int) -> Split:
    """Return the training images; of image files, perhaps the crop that belongs to an epoch."""
    train, data = job.splits.train, job.data
    is_reduced, has_pieces = data.train_decode == "reduced", data.train_crop == "random"
    if not isinstance(train, FolderSplit) or not (is_reduced or has_pieces):
        return train
    crop = RandomCrop(data.crop_area, data.crop_ratio) if has_pieces else None
    numbers = PieceNumbers(derive(job.seed, job.role, "piece", epoch))
    return TrainingFolder(train, crop, numbers, is_reduced=is_reduced)


@dataclass(frozen=True)
class PieceNumbers:
    """Random numbers for the crops of an epoch, by the images' positions; a value that worker processes can receive.

    Args:
        key: Names the role and epoch of a training.
    """

    key: int

    def __call__(self, samples: Tensor, count: int) -> list[list[float]]:
        """Return ``count`` numbers in [0, 1) for each position."""
        numbers: list[list[float]] = SampleDraws(self.key, samples.numpy()).uniform(Use.PIECE, count).tolist()
        return numbers


def _with_places(
    batches: Iterable[tuple[Tensor, Tensor]], order: Tensor, size: int, following: int, part: slice
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images, labels and training-set positions of each batch and of the images that follow it."""
    # If the training was killed after saving the last step of an epoch, no batch of it is left.
    starts = range(0, len(order) - following, size)
    for (images, labels), start in zip(batches, starts, strict=True):
        yield images, labels, order[start + part.start : start + part.stop + following]
