"""Where a data-free training gets its batches: latents for a generator, generated images for a student."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from qkd.config import AgentConfig
from qkd.data import normalize
from qkd.methods.data_free.making.arranging import Arrangement
from qkd.methods.data_free.making.samples import to_pixels
from qkd.methods.method import Synthesis
from qkd.seeding import stream
from qkd.training.job import Batch, Job


class Noise:
    """Images of N(0, 1).

    Args:
        shape: Channels, height and width.
        device: The device of the images.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self.shape, self.device = shape, device

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return images, and no classes."""
        return torch.randn(count, *self.shape, generator=generator).to(self.device), None


class Generated:
    """Images of a generator in eval mode.

    Args:
        generator: Maps latents and labels to images.
        latent: Size of a latent.
        classes: Number of classes of the teacher.
        device: Where the generator is.
        asks: Whether it takes a class.
    """

    def __init__(self, generator: nn.Module, *, latent: int, classes: int, device: torch.device, asks: bool) -> None:
        self.generator, self.device, self.asks = generator.eval().requires_grad_(False), device, asks
        self.latent, self.classes = latent, classes

    @torch.no_grad()
    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return images, and their classes if it takes one."""
        latents, labels = draw_latents(count, self.latent, self.classes, generator, self.device)
        return self.generator(latents, labels), labels if self.asks else None


class Pool:
    """Inverted images, drawn for every batch.

    Args:
        images: Normalized, shape ``[n, channels, height, width]``.
        labels: The teacher's class of each, int64, shape ``[n]``.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return images of the pool, without repeats if there are enough, and their classes."""
        order = torch.cat(
            [torch.randperm(len(self.images), generator=generator) for _ in range(-(-count // len(self.images)))]
        )
        chosen = order[:count].to(self.images.device)
        return self.images[chosen], self.labels[chosen]


def balanced_labels(count: int, classes: int, generator: torch.Generator, *, shuffled: bool = True) -> Tensor:
    """Return labels for a batch, int64 ``[count]``: every class as often as any other, or once more.

    In batches of fewer than two images per class, it is drawn for each batch which classes have one more, and the order
    is random: if it were always the first ones, the last classes of many would have half as many images as the others,
    or none. In larger batches it is the first ones.

    Args:
        count: Number of images in the batch.
        classes: Number of classes.
        generator: Draws the order, and the classes.
        shuffled: Whether the order of a larger batch is random; otherwise, classes follow each other.
    """
    if count < 2 * classes:
        rounds = [torch.randperm(classes, generator=generator) for _ in range(-(-count // classes))]
        return torch.cat(rounds)[:count]
    return (torch.randperm(count, generator=generator) if shuffled else torch.arange(count)) % classes


def draw_latents(
    count: int, latent: int, classes: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return latents of N(0, 1), ``[count, latent]``, and labels with the classes as balanced as possible."""
    latents = torch.randn(count, latent, generator=generator)
    labels = balanced_labels(count, classes, generator)
    return latents.to(device), labels.to(device)


class LatentSource:
    """Latents and labels for a generator's training, as batches of planes of one pixel.

    Args:
        job: Its seed, role and device.
        latent: Size of a latent.
        classes: Number of classes of the teacher.
        steps: Steps per epoch.
    """

    def __init__(self, job: Job, *, latent: int, classes: int, steps: int) -> None:
        self._job, self._latent, self._classes, self._steps = job, latent, classes, steps

    @property
    def images(self) -> int:
        """Return how many images an epoch makes."""
        return self._steps * self._job.data.batch_size

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the batches of an epoch."""
        job = self._job
        for step in range(first, self._steps):
            generator = stream(job.seed, job.role, "latents", epoch, step)
            latents, labels = draw_latents(size, self._latent, self._classes, generator, job.device)
            planes = latents[:, :, None, None]
            yield Batch(planes, labels, planes, epoch, step)


class MadeSource:
    """Made images for a student's training; the content of a batch depends on seed, role, epoch and step.

    An agent other than ``none`` augments them as pixels, which clips them to the range of images.

    Args:
        job: Its seed, role, agent and device.
        synthesis: Makes images.
        teacher: Gives the class of an image, if none was requested.
        images: Images per epoch.
        agent: The student's, as in the config.
        arrangement: Arrangement of the images of a batch; None leaves them unchanged.
    """

    def __init__(
        self,
        job: Job,
        synthesis: Synthesis,
        teacher: nn.Module,
        *,
        images: int,
        agent: AgentConfig,
        arrangement: Arrangement | None = None,
    ) -> None:
        self._job, self._synthesis, self._teacher, self._images = job, synthesis, teacher, images
        self._arrangement = arrangement
        self._augments = agent.policy != "none" or agent.cutout > 0

    @property
    def images(self) -> int:
        """Return how many images an epoch has."""
        return self._images

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch."""
        for step in range(first, self._images // size):
            images, labels = self._arranged(epoch, step, size)
            raw = to_pixels(images, self._job.splits.mean, self._job.splits.std)
            samples = torch.arange(step * size, (step + 1) * size)
            if self._augments:
                images = self._augmented(raw, epoch, samples)
            yield Batch(images, self._classes(images) if labels is None else labels, raw, epoch, step, samples)

    def _arranged(self, epoch: int, step: int, size: int) -> tuple[Tensor, Tensor | None]:
        if self._arrangement is None:
            return self.drawn(epoch, step, size)
        images, labels = self.drawn(epoch, step, self._arrangement.made(size))
        job = self._job
        return self._arrangement(images, labels, size, stream(job.seed, job.role, "arranged", epoch, step))

    def drawn(self, epoch: int, step: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the images of a batch that the method makes, and their classes if they were requested."""
        return self._synthesis.draw(count, stream(self._job.seed, self._job.role, "made", epoch, step))

    def _augmented(self, raw: Tensor, epoch: int, samples: Tensor) -> Tensor:
        job = self._job
        generator = stream(job.seed, job.role, "augment", epoch)
        seen = job.agent(raw, generator=generator, epoch=epoch, samples=samples)
        return normalize(seen, job.splits.mean, job.splits.std)

    @torch.no_grad()
    def _classes(self, images: Tensor) -> Tensor:
        return self._teacher(images).argmax(1)  # type: ignore[no-any-return]
