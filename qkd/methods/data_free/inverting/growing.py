"""A pool that grows while the student learns: each batch of images is made against the current student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qkd.config import AgentConfig
from qkd.config.data_free import DataFreeConfig
from qkd.data import Splits
from qkd.files import make_folder
from qkd.methods.data_free.inverting.contrast import Contrast
from qkd.methods.data_free.inverting.inversions import DeepInversion, Inversion, Inverted
from qkd.methods.data_free.inverting.meta import MetaInversion
from qkd.methods.data_free.inverting.pooling import BatchFiles, batches_of, load_pool, size_of
from qkd.methods.data_free.making.arranging import Arrangement
from qkd.methods.data_free.making.generating import logits_of
from qkd.methods.data_free.making.rival import Rival, rival_facts
from qkd.methods.data_free.making.samples import SHOWN, is_sampled, to_pixels, write_sample
from qkd.methods.data_free.making.sources import MadeSource, Pool
from qkd.methods.data_free.making.watching import Watched
from qkd.seeding import derive
from qkd.training.job import Batch, Job
from quantizers.modes import evaluating

FOLDER = "pool"  # in the folder of the training
WARM_UP = 0.1  # share of the batches without a student; Fast-DFKD's released settings have 20 of 220
GROWING_INVERSIONS: Mapping[
    str, Callable[[Watched, DataFreeConfig, Splits, int, torch.device, Rival | None], Inversion]
] = {
    "adaptive_inversion": DeepInversion,
    "cmi_adversarial": Contrast,
    "fast_dfkd": MetaInversion,
}


class Grown(nn.Module):
    """A pool's progress, kept in every checkpoint of the training that it grows with."""

    made: Tensor
    losses: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("made", torch.zeros((), dtype=torch.int64))  # batches
        self.register_buffer("losses", torch.zeros(2))  # of the last one; against the low-bit student


class GrowingPool:
    """Inverted images, the later ones made against the student.

    The first tenth, at least one batch, is made without the student and also calibrates it.

    Args:
        teacher: Frozen, with everything that the method reads.
        student: The net that learns. It is in eval mode while images are made, as published, and does not change.
        settings: The method, with its weights.
        splits: Shape of the images, classes, mean and standard deviation.
        seed: Seed of the run.
        device: Device of the nets.
    """

    def __init__(
        self,
        teacher: Watched,
        student: nn.Module,
        settings: DataFreeConfig,
        splits: Splits,
        seed: int,
        device: torch.device,
    ) -> None:
        self.teacher, self.student, self.settings, self.seed, self.device = teacher, student, settings, seed, device
        self.splits = splits
        self.count = batches_of(settings)
        self.grown = Grown().to(device)
        self.files: BatchFiles | None = None
        self._parts: list[Tensor] = []
        self._first: Inverted | None = None  # made before the location of its file is known
        self._pool: Pool | None = None

    @property
    def warm_up(self) -> int:
        """Return the number of batches made without the student."""
        return max(1, round(WARM_UP * self.count))

    @property
    def facts(self) -> dict[str, Tensor]:
        """Return the last batch's loss, shape ``[]``; with a float student, also the loss against the low-bit one."""
        return rival_facts("inversion", self.grown.losses, self.settings.student_for_generator)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return images from the current pool, without repeats if there are enough, and the teacher's classes.

        An empty pool gets its first batch; when training is resumed, those made before.

        Raises:
            FileNotFoundError: If the file of a finished batch is missing.
            ValueError: If one is damaged.
        """
        if not self._parts:
            self._read(int(self.grown.made))
        if self._pool is None:
            images = torch.cat(self._parts)
            self._pool = Pool(images, logits_of(self.teacher, images).argmax(1))
        return self._pool.draw(count, generator)

    def settle_in(self, folder: Path) -> None:
        """Set the folder of the batches. When training is resumed, it has the files of those already made.

        Args:
            folder: Folder of the training.
        """
        self.files = BatchFiles(make_folder(folder / FOLDER), self.count)

    def grow(self, due: int) -> None:
        """Make the batches that are due, and read those made before an interruption.

        Args:
            due: Total number of batches that should exist.

        Raises:
            FileNotFoundError: If the file of a finished batch is missing.
            ValueError: If one is damaged.
        """
        if self.files is None:
            raise ValueError("the growing pool has no folder yet")
        if not self._parts:
            self._read(int(self.grown.made))
        if self._first is not None:
            self.files.write(0, self._first)
            self._first = None
        for index in range(len(self._parts), due):
            made = self._made(index, self.files.state(index))
            self.files.write(index, made)
            self._add(made)

    def newest(self) -> Tensor:
        """Return some images of the last batch, uint8."""
        return to_pixels(self._parts[-1][:SHOWN], self.splits.mean, self.splits.std)

    def _begin(self) -> None:
        self._first = self._made(0, {})
        self._add(self._first)

    def _read(self, made: int) -> None:
        """Read the batches of a resumed training. If there are none, or the first one's file is missing, make it."""
        if self.files is None or made == 0 or not self.files.files[0].is_file():
            self._begin()  # it does not depend on a student
        first = len(self._parts)
        if self.files is not None and made > first:
            files = self.files.files[first:made]
            if gone := [path for path in files if not path.is_file()]:
                raise FileNotFoundError(
                    f"{gone[0]} is missing: the resumed checkpoint belongs to {made} batches of images; restore "
                    f"it, or delete {self.files.place.parent} to train again"
                )
            self._parts += [load_pool([path]).to(self.device) for path in files]
            self._pool = None

    def _made(self, index: int, state: dict[str, np.ndarray]) -> Inverted:
        rival = None if index < self.warm_up else Rival(self.student, self.settings.student_for_generator)
        inverter = GROWING_INVERSIONS[self.settings.method](
            self.teacher, self.settings, self.splits, self.seed, self.device, rival
        )
        torch.manual_seed(derive(self.seed, "growing pool", index))
        with evaluating(self.student):
            return inverter(index, size_of(self.settings, index), state)

    def _add(self, made: Inverted) -> None:
        self._parts.append(made.images.to(self.device))
        self._pool = None
        told = made.loss if made.low_bit_loss is None else made.low_bit_loss
        with torch.no_grad():
            self.grown.made.fill_(max(len(self._parts), int(self.grown.made)))
            self.grown.losses.copy_(torch.tensor([made.loss, told]))


class GrowingSource(MadeSource):
    """Batches of a pool that grows evenly over the training, so that every batch is the newest for equally long.

    A batch of the pool is made after the previous student step (and checkpoint), so that a resumed training
    makes it again against the same student.

    Args:
        job: Provides seed, role, agent, device and folder.
        pool: The pool.
        images: Images per epoch.
        agent: Agent of the student.
        arrangement: Arrangement of the images of a batch, as for :class:`MadeSource`.
    """

    def __init__(
        self, job: Job, pool: GrowingPool, *, images: int, agent: AgentConfig, arrangement: Arrangement | None = None
    ) -> None:
        super().__init__(job, pool, pool.teacher.net, images=images, agent=agent, arrangement=arrangement)
        self._pool = pool
        pool.settle_in(job.folder)

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch."""
        made, job, steps = super().batches(epoch, first, size), self._job, self.images // size
        for step in range(first, steps):
            self._pool.grow(due(self._pool.count, epoch * steps + step, job.config.epochs * steps))
            if step == 0 and is_sampled(epoch, job.config.epochs):
                write_sample(job.folder, epoch, self._pool.newest())
            yield replace(next(made), facts=self._pool.facts)


def due(count: int, step: int, steps: int) -> int:
    """Return how many batches a pool has before a step: batch ``i`` is made before step ``i * steps // count``.

    Args:
        count: Final number of batches.
        step: Step of the training, from 0.
        steps: Number of steps of the training.
    """
    return sum(index * steps // count <= step for index in range(count))
