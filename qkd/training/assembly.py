"""Put the training of a role together: the one place where a job is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from qkd.agents import build_agent
from qkd.config import AgentConfig, RunConfig, TrainConfig
from qkd.data import Splits
from qkd.engines.engine import current
from qkd.files import sha256_of, write_text
from qkd.progress import Progress
from qkd.run.folder import RunFolder
from qkd.training.arithmetic.choice import FILE as ARITHMETIC
from qkd.training.checkpoint import CheckpointStore
from qkd.training.job import FitResult, Job, Partner, Phase, Source, StepRule
from qkd.training.loop import fit

WEIGHTS = "weights.safetensors"  # in each role's folder


@dataclass(frozen=True)
class Context:
    """A run as its trainings see it.

    Args:
        run: The run folder, with the config.
        splits: Its images, on ``device``.
        device: Where to train.
        progress: Where to talk.
    """

    run: RunFolder
    splits: Splits
    device: torch.device
    progress: Progress

    @property
    def config(self) -> RunConfig:
        """Return the run's config."""
        return self.run.config


@dataclass(frozen=True)
class Made:
    """What a role brings to its training.

    Args:
        model: Trained in place, on the context's device.
        phases: Of its training; empty where its weights are used unchanged.
        begin: Brings model and partners to their start; called where there is no checkpoint.
        save: Writes the model, and what else is kept, at the end; returns the files.
        score: Scores the model on the test images, once, and writes the result; returns the files.
        partners: Nets that are trained beside it.
        others: Role -> further models that a diagnosis watches.
        scales: Gives the quantizer scales among the model's parameters.
        marks: Name -> hash of a source, beside the images and the agent's schedule.
        settings: What of the config it follows beside its own section.
        inputs: Files of the run folder that it is made from.
        vary: Brings the model to the start of a member of a population; None where all members have one start.
        source: Makes what gives the training batches; None where they are the run's training images.
        rules: Makes what has its say at every step of the optimizer.
        takes_images: Whether the model can be called with a batch of images alone; a generator takes latents.
    """

    model: nn.Module
    phases: tuple[Phase, ...]
    begin: Callable[[], None]
    save: Callable[[], list[Path]]
    score: Callable[[FitResult | None], list[Path]]
    partners: tuple[Partner, ...] = ()
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    scales: Callable[[], Iterable[nn.Parameter]] = tuple
    marks: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Sequence[Path] = ()
    vary: Callable[[int], None] | None = None
    source: Callable[[Job], Source] | None = None
    rules: Callable[[Optimizer], Sequence[StepRule]] = lambda _: ()
    takes_images: bool = True


class Role(Protocol):
    """A net of a run that is trained: teacher, student, or one that they need first."""

    @property
    def context(self) -> Context:
        """Return the run that it is part of, in whose config it may have another's place."""
        ...

    @property
    def name(self) -> str:
        """Return what names its random streams, and its manifest where it is a part of a stage."""
        ...

    @property
    def folder(self) -> str:
        """Return where in the run folder it is written."""
        ...

    @property
    def title(self) -> str:
        """Return what people call it: ``teacher``, ``student``, ``auxiliary``."""
        ...

    @property
    def train(self) -> TrainConfig | None:
        """Return optimizer and length of its training; None where its weights are used unchanged."""
        ...

    def agent(self) -> AgentConfig:
        """Return its agent, None until it is found."""
        ...

    def make(self) -> Made:
        """Build its nets, its phases and what learns beside it."""
        ...


@dataclass(frozen=True)
class Training:
    """A role's training, put together.

    Args:
        job: What the loop takes; None where weights are used unchanged.
        made: What the role brought.
        folder: Of the role.
    """

    job: Job | None
    made: Made
    folder: Path

    def run(self, progress: Progress) -> FitResult | None:
        """Train to the end (resuming); None where there is nothing to train."""
        if self.job is not None:
            return fit(self.job, progress, self.made.begin)
        write_text(self.folder / "metrics.jsonl", "")
        return None

    def finish(self, fitted: FitResult | None) -> list[Path]:
        """Write weights and result; return the files of the manifest."""
        chosen = [file] if (file := self.folder / ARITHMETIC).is_file() else []
        return [*self.made.save(), self.folder / "metrics.jsonl", *chosen, *self.made.score(fitted)]

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a training that is done and written; keep the last one where that is asked for."""
        store = CheckpointStore(self.folder / "checkpoint", warn=lambda _: None)
        if self.job is not None and self.job.config.keep_checkpoint:
            store.prune(1)
        else:
            store.clear()


def assemble(role: Role) -> Training:
    """Return a role's training, ready to begin.

    Args:
        role: Which; the length of its training is that of its config.

    Raises:
        ValueError: If a net, an agent, a loss term or a tap cannot be used.
        FileNotFoundError: If something that it is made from is not there yet.
    """
    context, train, made = role.context, role.train, role.make()
    folder, splits = context.run.path / role.folder, context.splits
    if train is None:
        return Training(None, made, folder)
    agent = role.agent()
    job = Job(
        role=role.name,
        model=made.model,
        config=train,
        data=context.config.data,
        splits=splits,
        agent=build_agent(agent, epochs=train.epochs, mean=splits.mean),
        phases=made.phases,
        seed=context.config.seed,
        device=context.device,
        folder=folder,
        fingerprint={"data": splits.fingerprint, **made.marks, **agent_mark(agent)},
        settings=made.settings,
        scales=made.scales,
        others=made.others,
        partners=made.partners,
        log=context.config.log,
        source=made.source,
        rules=made.rules,
        takes_images=made.takes_images,
    )
    return Training(job, made, folder)


def train_part(role: Role) -> list[Path]:
    """Train a role that is a part of the stage that needs it first (resuming), with its own manifest.

    Args:
        role: Which.

    Returns:
        Its files.

    Raises:
        TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    run, engine = role.context.run, current()
    if not engine.first(lambda: run.is_complete(role.name)):
        run.folder(role.folder)
        training = assemble(role)
        made = training.finish(training.run(role.context.progress))
        run.complete(role.name, made, dict.fromkeys(training.made.inputs))
        training.drop_checkpoints()
        engine.wait()
    files = (run.path / role.folder / name for name in (WEIGHTS, "metrics.jsonl", "result.json"))
    return [path for path in files if path.is_file()]  # inverted images have no weights


def agent_mark(agent: AgentConfig) -> dict[str, str]:
    """Return the hash of the agent's schedule file, if it has one: a changed schedule is another training."""
    return {} if agent.schedule is None else {"schedule": sha256_of(agent.schedule)}
