"""The parts of a training: the job, its phases, and the inputs and outputs of a step."""

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
    """What the loop needs from an augmentation agent: uint8 in, uint8 out, same shape; ``epoch`` counts from 0."""

    def __call__(
        self, images: Tensor, *, generator: torch.Generator, epoch: int, samples: Tensor | None = None
    ) -> Tensor:
        """Return the augmented images; with ``samples`` (positions in the data set), independent of the batch."""
        ...

    @property
    def following(self) -> int:
        """How many images after a batch must be passed along with it, to be mixed into it."""
        ...

    def with_labels(
        self, images: Tensor, labels: Tensor, *, generator: torch.Generator, epoch: int, samples: Tensor | None = None
    ) -> tuple[Tensor, Mixed | None]:
        """Return the augmented images, and second labels if images are mixed; the extra rows come last."""
        ...


@dataclass(frozen=True)
class Batch:
    """The input of a step.

    Args:
        images: Augmented and normalized, float32, shape ``[batch, channels, height, width]``.
        labels: int64, shape ``[batch]``.
        raw: The images before augmentation, uint8, same shape.
        epoch: From 0.
        step: Step of the epoch, from 0.
        samples: Positions of the images in the training set, int64, shape ``[batch]``; None if they have none.
        mixed: Second labels if the agent mixes images (CutMix).
        facts: Values from the source, for the metrics: shape ``[]`` each, without a graph.
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
        """Return some of its images, with everything that belongs to them."""
        samples = None if self.samples is None else self.samples[part]
        mixed = None if self.mixed is None else self.mixed.rows(part)
        return Batch(
            self.images[part], self.labels[part], self.raw[part], self.epoch, self.step, samples, mixed
        )  # fmt: skip


class Source(Protocol):
    """A source of training batches, which are the same whenever an epoch is repeated."""

    @property
    def images(self) -> int:
        """Number of images per epoch."""
        ...

    def batches(self, epoch: int, first: int, size: int) -> Iterator[Batch]:
        """Yield the full batches of an epoch (from 0), starting at step ``first``, with ``size`` images each."""
        ...


@dataclass(frozen=True)
class StepResult:
    """The output of a step.

    Args:
        loss: What is minimized, shape ``[]``.
        terms: Its parts before weighting, shape ``[]`` each, with their graph (for diagnosis).
        logits: Of the net being trained, shape ``[batch, classes]``.
        task: The part of the loss that comes from the labels alone, shape ``[]``; None if unknown.
        knowledge: The part that comes from a teacher, shape ``[]``; None if unknown.
        facts: More values, averaged in the epoch's line of the metrics, shape ``[]`` each, without a graph.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    logits: Tensor
    task: Tensor | None = None
    knowledge: Tensor | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)


Step = Callable[[Batch], StepResult]
Backward = Callable[[Batch, StepResult, Callable[[Tensor], Tensor]], None]
"""How a step's result becomes gradients: takes batch, result, and the loss scaling for reduced precision."""


def plain_backward(batch: Batch, result: StepResult, scale: Callable[[Tensor], Tensor]) -> None:  # noqa: ARG001
    """Back-propagate the loss."""
    if not result.loss.requires_grad:
        raise RuntimeError("the loss has no gradient: no net that learns had a part in it (was it detached?)")
    scale(result.loss).backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Partner:
    """A net that is trained along with the job's model and then discarded: an adapter, a branch, a learning teacher.

    Its state is in every checkpoint. In a phase that gives its parameters no gradient it does not change.

    Args:
        name: Names its tensors in checkpoints; unique among the job's partners.
        module: On the job's device.
        lr_factor: Factor on the learning rate; weight decay is that of the job.
        optimizer: Updates its parameters when the phase's own step calls it. If omitted, the loop's optimizer does.
        scales: Returns the quantizer scales among its parameters; called once it is initialized.
    """

    name: str
    module: nn.Module
    lr_factor: float = 1.0
    optimizer: Optimizer | None = None
    scales: Callable[[], Iterable[nn.Parameter]] = tuple


@dataclass(frozen=True)
class Moment:
    """The state of a training at a step.

    Args:
        rate: The learning rate relative to its peak, including the phase's factor.
        peak: The largest learning rate.
        done: Share of the training's steps that are done, in ``[0, 1)``.
        steps: Steps of the whole training.
        settles: Whether the phase trains the deployed arithmetic, which high rates break.
    """

    rate: float
    peak: float
    done: float
    steps: int
    settles: bool = False


class StepRule(Protocol):
    """A rule that acts at every optimizer step: on rates and gradients before it, on weights after it."""

    @property
    def name(self) -> str:
        """Return the name of its tensors in checkpoints; unique among the job's rules."""
        ...

    def before(self, moment: Moment) -> None:
        """Change the groups' rates, or the gradients, which are unscaled and clipped."""
        ...

    def after(self, moment: Moment) -> None:
        """Inspect what the step did to the weights, and change them."""
        ...

    def facts(self) -> Mapping[str, float]:
        """Return values for an epoch's line of the metrics."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return what it needs to resume, by name."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned; model and optimizer are already restored."""
        ...


@dataclass(frozen=True)
class Phase:
    """A range of epochs with the same step.

    Args:
        name: Shown in logs.
        epochs: Its length.
        step: The forward pass and the loss.
        enter: Called at the start of each of its epochs, after ``model.train()``.
        hold: Context that is active while it trains (hooks).
        allows_autocast: Whether reduced precision may be used.
        lr_factor: Factor on the scheduled learning rate.
        backward: Turns the step's result into gradients.
        begin: Called once, before the first step of the phase, after ``enter``.
        settles: Whether it trains the deployed arithmetic, with frozen batch norm.
        renews_statistics: Whether ``begin`` sets batch norm's running statistics again, for averaged weights, too, and
            for the weights of an earlier epoch that are kept in the end.
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
    renews_statistics: bool = False


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
        folder: Receives ``metrics.jsonl`` and ``checkpoint/``.
        fingerprint: Name -> hash of each input of the training; a checkpoint with other inputs is refused.
        settings: Settings it depends on besides ``config``: plain values by name, compared like the fingerprint.
        scales: Returns the quantizer scales among the model's parameters; called once the model is initialized.
        others: Role -> further models that a diagnosis watches.
        partners: Nets that are trained along with the model.
        source: Builds the source of the training batches. If omitted: ``splits.train`` with ``agent``.
        log: What to write for each epoch in addition to ``metrics.jsonl``.
        rules: Builds the rules that act at every step, from an optimizer and the initialized model.
        takes_images: Whether the model can be called with a batch of images alone; a generator takes latents.

    Raises:
        ValueError: If the best epoch is to be kept, and there are no validation images to tell it by.
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

    def __post_init__(self) -> None:
        if self.config.keep == "best" and len(self.splits.val) == 0:
            raise ValueError(
                f"{self.role}: `keep: best` needs validation images, but there are none: raise data.val_fraction"
            )


@dataclass(frozen=True)
class FitResult:
    """The result of a training.

    Args:
        epochs: Its length.
        seconds: Time spent training, without validation, over all interruptions.
        images_per_second: Training images per second of that time.
        rows: The lines of ``metrics.jsonl``.
        kept_epoch: The epoch whose weights the model has, from 1; None for the last one.
    """

    epochs: int
    seconds: float
    images_per_second: float
    rows: tuple[Mapping[str, Any], ...]
    kept_epoch: int | None = None
