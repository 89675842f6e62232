"""A generator that learns with the student: the source of batches updates it between the student's steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qkd.config import AgentConfig
from qkd.config.data_free import ADVERSARIAL, JOINT, DataFreeConfig
from qkd.methods.data_free.making.arranging import Arrangement
from qkd.methods.data_free.making.generating import TrainedGenerator, sample_generator
from qkd.methods.data_free.making.kinds import weights_of
from qkd.methods.data_free.making.objectives import OBJECTIVES, Moment
from qkd.methods.data_free.making.rival import Rival, rival_facts
from qkd.methods.data_free.making.samples import is_sampled
from qkd.methods.data_free.making.sources import MadeSource, draw_latents
from qkd.methods.data_free.making.watching import Watched
from qkd.progress import Progress
from qkd.seeding import derive, stream
from qkd.training.finite import TrainingError
from qkd.training.job import Batch, Job

SAME_LATENTS = {"zskt"}  # methods whose student steps use the latents of the generator's step


@dataclass(frozen=True)
class Move:
    """A step of a generator.

    Args:
        loss: Shape ``[]``.
        images: The images that the loss was computed on, made before the step.
    """

    loss: Tensor
    images: Tensor


class Adversary:
    """A generator that learns together with the student, its optimizer, and both nets.

    Args:
        net: The generator, on its device.
        optimizer: For its parameters.
        teacher: Frozen.
        student: The net that learns. Its weights do not change, but batch norm in training mode sees these images,
            too (as published).
        settings: The method, with its weights.
        classes: Number of classes of the teacher.
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
        self.net, self.optimizer, self.teacher = net, optimizer, teacher
        self.rival = Rival(student, settings.student_for_generator)
        self.settings, self.classes = settings, classes

    @property
    def facts(self) -> dict[str, Tensor]:
        """Return the last step's loss, shape ``[]``; with a float student, also the loss against the low-bit one."""
        return rival_facts("generator", self.net.references, self.settings.student_for_generator)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return images from the current generator."""
        with torch.no_grad():
            return self.net(*self.latents(count, generator)), None

    def latents(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return latents and labels."""
        device = self.net.references.device
        return draw_latents(count, self.settings.latent, self.classes, generator, device)

    def learn(self, count: int, generator: torch.Generator, *, alone: bool = False) -> Move:
        """Take a step of the generator.

        Args:
            count: Images.
            generator: For the latents.
            alone: Leave out the terms that read the student.
        """
        latents, labels = self.latents(count, generator)
        images = self.net(latents, labels)
        moment = Moment(images, latents, labels, self.teacher(images), self.net.references)
        answer = self.rival(images) if self.settings.family == ADVERSARIAL and not alone else None
        loss = self._loss(moment, None if answer is None else answer.logits)
        parameters = list(self.net.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            told = loss if answer is None or answer.low_bit is answer.logits else self._loss(moment, answer.low_bit)
            # shown with every step until the next update, also when training is resumed
            self.net.references.copy_(torch.stack((loss.detach(), told.detach())))
        return Move(loss.detach(), images.detach())

    def warm_up(self, count: int, seed: int, role: str, progress: Progress) -> None:
        """Take the steps of the warm-up, which read the teacher alone: GDFQ has them, too, before its student learns.

        Images of an untrained generator are unlike any that the teacher knows: activation ranges calibrated on them are
        wrong, and a low-bit student whose first steps learn from them loses the weights that it started from.

        Args:
            count: Images per step.
            seed: The run's.
            role: Name of the student's random streams.
            progress: Where to report.

        Raises:
            TrainingError: If the loss diverges.
        """
        steps = self.settings.warmed_up
        if not steps:
            return
        with progress.track(steps, f"{role}: generator's warm-up", "steps") as tracker:
            for step in range(steps):
                loss = self.learn(count, stream(seed, role, "warmup", step), alone=True).loss
                _require_finite(role, loss, 0, step + 1)
                tracker.update(loss=float(loss))

    def _loss(self, moment: Moment, student_logits: Tensor | None) -> Tensor:
        weights = weights_of(self.settings.method, self.settings.weights)
        return OBJECTIVES[self.settings.method](replace(moment, student_logits=student_logits), weights).loss


class AdversarialSource(MadeSource):
    """Images of a generator that learns with the student: one step before every ``student_steps`` student steps.

    If both learn jointly (DAFL as published), the generator takes one step before each student step, and the student
    learns from the same images. Back-propagating the sum of both losses once gives the same two gradients, since the
    generator's loss does not read the student, and the images are constants in the student's loss.

    A batch is made when the loop requests it, after the previous step (and checkpoint), so that a resumed training
    finds the generator unchanged.

    Args:
        job: Provides seed, role, agent and device.
        adversary: The generator.
        images: Images per epoch.
        agent: Agent of the student.
        arrangement: Arrangement of the images of a batch, as for :class:`MadeSource`.
    """

    def __init__(
        self, job: Job, adversary: Adversary, *, images: int, agent: AgentConfig, arrangement: Arrangement | None = None
    ) -> None:
        super().__init__(
            job, adversary, adversary.teacher.net, images=images, agent=agent, arrangement=arrangement
        )  # fmt: skip
        self._adversary = adversary
        self._is_joint = adversary.settings.family == JOINT
        self._every = 1 if self._is_joint else adversary.settings.student_steps
        self._joint_images: Tensor | None = None

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch."""
        made = super().batches(epoch, first, size)
        for step in range(first, self.images // size):
            if step == 0 and is_sampled(epoch, self._job.config.epochs):
                job, own = self._job, self._adversary
                sample_generator(own.net, own.settings, job.splits, job.seed, job.folder, epoch)
            self._play(epoch, step, size)
            yield replace(next(made), facts=self._adversary.facts)

    def drawn(self, epoch: int, step: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return a batch's images: from its own latents, from those of the generator's step, or that step's images."""
        if self._joint_images is not None:
            return self._joint_images[:count], None
        place = step // self._every if self._adversary.settings.method in SAME_LATENTS else step
        return self._adversary.draw(count, self._stream("made", epoch, place))

    def _play(self, epoch: int, step: int, size: int) -> None:
        if step % self._every:
            return
        same = self._adversary.settings.method in SAME_LATENTS
        draws = self._stream("made" if same else "adversary", epoch, step // self._every)
        torch.manual_seed(derive(self._job.seed, self._job.role, "adversary", epoch, step))  # dropout of the student
        move = self._adversary.learn(size, draws)
        self._joint_images = move.images if self._is_joint else None
        _require_finite(self._job.role, move.loss, epoch + 1, step + 1)

    def _stream(self, name: str, epoch: int, place: int) -> torch.Generator:
        return stream(self._job.seed, self._job.role, name, epoch, place)


def _require_finite(role: str, loss: Tensor, epoch: int, step: int) -> None:
    """Raise :class:`TrainingError` if the loss of a step is not finite; epoch 0 is the warm-up."""
    if not bool(torch.isfinite(loss)):
        place = f"at epoch {epoch}, step {step}" if epoch else f"at step {step} of its warm-up"
        raise TrainingError(
            f"{role}: the generator's loss is {float(loss)} {place}; "
            f"lower student.data_free.lr or its weights, and give the run another name",
            epoch=epoch,
            step=step,
        )
