"""A generator that plays against the student: it moves between the student's steps, inside the source of batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from qkd.config import AgentConfig
from qkd.config.data_free import DataFreeConfig
from qkd.methods.data_free.making.generating import TrainedGenerator, sample_generator
from qkd.methods.data_free.making.kinds import weights_of
from qkd.methods.data_free.making.objectives import OBJECTIVES, Moment
from qkd.methods.data_free.making.samples import is_sampled
from qkd.methods.data_free.making.sources import MadeSource, draw_latents
from qkd.methods.data_free.making.watching import Watched
from qkd.seeding import derive, stream
from qkd.training.finite import TrainingError
from qkd.training.job import Batch, Job

SAME_LATENTS = {"zskt"}  # the student's steps see the latents that the generator's step saw


class Adversary:
    """The generator, its optimizer, and the nets that it plays between.

    Args:
        net: The generator, on its device.
        optimizer: Of its parameters.
        teacher: Frozen.
        student: What learns; its weights stay, but batch norm in training mode sees these images, too (as published).
        settings: Which method, with its weights.
        classes: Of the teacher.
    """

    def __init__(
        self,
        net: TrainedGenerator,
        optimizer: torch.optim.Optimizer,
        teacher: Watched,
        student: nn.Module,
        settings: DataFreeConfig,
        classes: int,
    ) -> None:
        self.net, self.optimizer, self.teacher, self.student = net, optimizer, teacher, student
        self.settings, self.classes = settings, classes

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return images as the generator makes them now."""
        with torch.no_grad():
            return self.net(*self.latents(count, generator)), None

    def latents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents and labels."""
        device = self.net.references.device
        return draw_latents(count, self.settings.latent, self.classes, generator, device)

    def learn(self, count: int, generator: torch.Generator) -> Tensor:
        """Take a step of the generator; return its loss, shape ``[]``."""
        latents, labels = self.latents(count, generator)
        images = self.net(latents, labels)
        seen, logits = self.teacher(images), self.student(images)
        moment = Moment(images, latents, labels, seen, self.net.references, logits)
        weights = weights_of(self.settings.method, self.settings.weights)
        loss = OBJECTIVES[self.settings.method](moment, weights).loss
        parameters = list(self.net.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.net.references[0] = loss.detach()  # shown with every step until the next one, also by a resumed training
        return loss.detach()


class AdversarialSource(MadeSource):
    """Images of a generator that learns along: before every ``student_steps`` steps of the student it takes one.

    A batch is made when the loop asks for it, behind the step (and the checkpoint) before, so that a training that is
    resumed finds the generator unchanged.

    Args:
        job: Its seed, role, agent and device.
        adversary: The generator.
        images: An epoch.
        agent: Of the student.
    """

    def __init__(self, job: Job, adversary: Adversary, *, images: int, agent: AgentConfig) -> None:
        super().__init__(job, adversary, adversary.teacher.net, images=images, agent=agent)
        self._adversary = adversary

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch."""
        made = super().batches(epoch, first, size)
        for step in range(first, self.images // size):
            if step == 0 and is_sampled(epoch, self._job.config.epochs):
                job, own = self._job, self._adversary
                sample_generator(own.net, own.settings, job.splits, job.seed, job.folder, epoch)
            self._play(epoch, step, size)
            yield replace(next(made), facts={"generator": self._adversary.net.references[0].clone()})

    def drawn(self, epoch: int, step: int, size: int) -> tuple[Tensor, Tensor | None]:
        """Return the images of a batch: of its own latents, or of those that the generator's step saw."""
        every = self._adversary.settings.student_steps
        place = step // every if self._adversary.settings.method in SAME_LATENTS else step
        return self._adversary.draw(size, self._stream("made", epoch, place))

    def _play(self, epoch: int, step: int, size: int) -> None:
        every = self._adversary.settings.student_steps
        if step % every:
            return
        same = self._adversary.settings.method in SAME_LATENTS
        draws = self._stream("made" if same else "adversary", epoch, step // every)
        torch.manual_seed(derive(self._job.seed, self._job.role, "adversary", epoch, step))  # drop-out of the student
        loss = self._adversary.learn(size, draws)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"{self._job.role}: the generator's loss is {float(loss)} at epoch {epoch + 1}, step {step + 1}; lower "
                f"student.data_free.lr or its weights, under another name",
                epoch=epoch + 1,
                step=step + 1,
            )

    def _stream(self, name: str, epoch: int, place: int) -> torch.Generator:
        return stream(self._job.seed, self._job.role, name, epoch, place)
