"""What a training is made of: the job, its phases, what a step is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from qkd.agents.operations.mixing import Mixed
from qkd.config import DataConfig, LogConfig, TrainConfig
from qkd.data import Splits


class Agent(Protocol):
    """What the loop needs of an augmentation agent: uint8 in, uint8 out, same shape; ``epoch`` counts from 0."""

    def __call__(
        self, images: Tensor, *, generator: torch.Generator, epoch: int, samples: Tensor | None = None
    ) -> Tensor:
        """Return the augmented images; with ``samples`` (positions in the data set) whatever batch they are in."""
        ...

    @property
    def following(self) -> int:
        """How many images that come after a batch are to be given with it, to be mixed into it."""
        ...

    def with_labels(
        self, images: Tensor, labels: Tensor, *, generator: torch.Generator, epoch: int, samples: Tensor | None = None
    ) -> tuple[Tensor, Mixed | None]:
        """Return the augmented images, and second labels where images are mixed; rows that followed come last."""
        ...


@dataclass(frozen=True)
class Batch:
    """What a step is given.

    Args:
        images: Augmented and normalized, float32, shape ``[batch, channels, height, width]``.
        labels: int64, shape ``[batch]``.
        raw: The images before augmentation, uint8, same shape.
        epoch: From 0.
        step: Step of the epoch, from 0.
        samples: Positions of the images in the training set, int64, shape ``[batch]``; None where they have none.
        mixed: Second labels where the agent mixes images (CutMix).
        facts: What a source tells of it, for the metrics: shape ``[]`` each, without a graph.
    """

    images: Tensor
    labels: Tensor
    raw: Tensor
    epoch: int
    step: int
    samples: Tensor | None = None
    mixed: Mixed | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, part: slice) -> Batch:
        """Return some of its images, with all that belongs to them."""
        samples = None if self.samples is None else self.samples[part]
        mixed = None if self.mixed is None else self.mixed.rows(part)
        return Batch(
            self.images[part], self.labels[part], self.raw[part], self.epoch, self.step, samples, mixed
        )  # fmt: skip


class Source(Protocol):
    """Where training batches come from: the same ones whenever an epoch is gone through again."""

    @property
    def images(self) -> int:
        """How many images an epoch has."""
        ...

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch (from 0), beginning with step ``first``, of ``size`` images each."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What a step gives back.

    Args:
        loss: What is minimized, shape ``[]``.
        terms: Its parts before weighting, shape ``[]`` each, with their graph (for a diagnosis).
        logits: Of the net being trained, shape ``[batch, classes]``.
        task: What of the loss comes from the labels alone, shape ``[]``; None where a step does not tell.
        knowledge: What of it comes from a teacher, shape ``[]``; None likewise.
        facts: Further values whose mean an epoch's line of the metrics gets, shape ``[]`` each, without a graph.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    logits: Tensor
    task: Tensor | None = None
    knowledge: Tensor | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)


Step = Callable[[Batch], StepResult]
Backward = Callable[[Batch, StepResult, Callable[[Tensor], Tensor]], None]
"""How a step's result becomes gradients: batch, result, and what scales a loss for reduced precision."""


def plain_backward(batch: Batch, result: StepResult, scale: Callable[[Tensor], Tensor]) -> None:  # noqa: ARG001
    """Back-propagate the loss."""
    scale(result.loss).backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Partner:
    """A net that is trained beside the job's model and thrown away: an adapter, a branch, a teacher that learns, too.

    Its state is in every checkpoint. In a phase that gives its parameters no gradient it does not change.

    Args:
        name: Names its tensors in checkpoints; no other partner of the job has it.
        module: On the job's device.
        lr_factor: Factor on the learning rate; weight decay is the job's.
        optimizer: Moves its parameters where the phase's own step calls it; absent: the loop's does.
        scales: Gives the quantizer scales among its parameters; called once it is at its start.
    """

    name: str
    module: nn.Module
    lr_factor: float = 1.0
    optimizer: Optimizer | None = None
    scales: Callable[[], Iterable[nn.Parameter]] = tuple


@dataclass(frozen=True)
class Moment:
    """Where a training stands at a step.

    Args:
        rate: The learning rate over its peak, with the phase's factor.
        peak: The largest learning rate.
        done: Share of the training's steps that are behind it, in ``[0, 1)``.
        steps: Of the whole training.
        settles: Whether the phase trains the deployed arithmetic, which high rates break.
    """

    rate: float
    peak: float
    done: float
    steps: int
    settles: bool = False


class StepRule(Protocol):
    """What has its say at every step of the optimizer: on rates and gradients before it, on weights after it."""

    @property
    def name(self) -> str:
        """Return what names its tensors in checkpoints; no other rule of the job has it."""
        ...

    def before(self, moment: Moment) -> None:
        """Change rates of groups or gradients, which are unscaled and clipped."""
        ...

    def after(self, moment: Moment) -> None:
        """Look at what the step did to the weights, and change them."""
        ...

    def facts(self) -> Mapping[str, float]:
        """Return values for an epoch's line of the metrics."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what it needs to resume, by name."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state` returned; model and optimizer are in place already."""
        ...


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with one step.

    Args:
        name: Shown in logs.
        epochs: Its length.
        step: The forward pass and the loss.
        enter: Called at the start of each of its epochs, after ``model.train()``.
        hold: Context that is open while it trains (hooks).
        allows_autocast: Whether reduced precision may be used.
        lr_factor: Factor on the scheduled learning rate.
        backward: Turns the step's result into gradients.
        begin: Called once, before the first step of the phase, after ``enter``.
        settles: Whether it trains the deployed arithmetic, with frozen batch norm.
    """

    name: str
    epochs: int
    step: Step
    enter: Callable[[], None] = lambda: None
    hold: Callable[[], AbstractContextManager[object]] = nullcontext
    allows_autocast: bool = True
    lr_factor: float = 1.0
    backward: Backward = plain_backward
    begin: Callable[[], None] = lambda: None
    settles: bool = False


@dataclass(frozen=True)
class Job:
    """Everything a training needs.

    Args:
        role: Names its random streams: ``teacher``, ``student``, ``student_float``.
        model: Trained in place, on ``device``.
        config: Optimizer, schedule, length.
        data: Batch sizes and workers.
        splits: The images.
        agent: Augments the training images.
        phases: In order; their epochs add up to ``config.epochs``.
        seed: The run's seed.
        device: Where to train.
        folder: Gets ``metrics.jsonl`` and ``checkpoint/``.
        fingerprint: Name -> hash of what the training was made from; a checkpoint made from something else is refused.
        settings: What of the config it follows beside ``config``: plain values by name, compared as the fingerprint is.
        scales: Gives the quantizer scales among the model's parameters; called once the model is at its start.
        others: Role -> further models that a diagnosis watches.
        partners: Nets that are trained beside the model.
        source: Makes what gives the training batches; absent: the images of ``splits.train`` with ``agent``.
        log: What is written of each epoch beside ``metrics.jsonl``.
        rules: Makes what has its say at every step, for an optimizer and the model at its start.
        takes_images: Whether the model can be called with a batch of images alone; a generator takes latents.
    """

    role: str
    model: nn.Module
    config: TrainConfig
    data: DataConfig
    splits: Splits
    agent: Agent
    phases: tuple[Phase, ...]
    seed: int
    device: torch.device
    folder: Path
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    scales: Callable[[], Iterable[nn.Parameter]] = tuple
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    partners: tuple[Partner, ...] = ()
    source: Callable[[Job], Source] | None = None
    log: LogConfig = LogConfig()
    rules: Callable[[Optimizer], Sequence[StepRule]] = lambda _: ()
    takes_images: bool = True


@dataclass(frozen=True)
class FitResult:
    """What a training was.

    Args:
        epochs: Its length.
        seconds: Spent training, validation apart, over all interruptions.
        images_per_second: Training images, over those seconds.
        rows: The lines of ``metrics.jsonl``.
        kept_epoch: Whose weights the model has, from 1; None: the last one's.
    """

    epochs: int
    seconds: float
    images_per_second: float
    rows: tuple[Mapping[str, Any], ...]
    kept_epoch: int | None = None
