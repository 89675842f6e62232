"""Put together the training of a role: the only place where a job is built."""

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
    """A run from the point of view of its trainings.

    Args:
        run: The run folder, with the config.
        splits: Its images, on ``device``.
        device: Where to train.
        progress: Where to report.
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
    """What a role contributes to its training.

    Args:
        model: Trained in place, on the context's device.
        phases: Phases of its training; empty if its weights are used unchanged.
        begin: Initializes model and partners; called if there is no checkpoint.
        save: Writes the model and anything else to keep at the end; returns the files.
        score: Scores the model on the test images, once, and writes the result; returns the files.
        partners: Nets that are trained along with it.
        others: Role -> further models that a diagnosis watches.
        scales: Returns the quantizer scales among the model's parameters.
        marks: Name -> hash of a source, in addition to the images and the agent's schedule.
        settings: The settings that it depends on outside its own section.
        inputs: Files of the run folder that it depends on.
        vary: Initializes the model for one member of a population; None if all members have the same start.
        source: Builds the source of the training batches; None if they are the run's training images.
        rules: Builds the rules that act at every step of the optimizer.
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
    """A net of a run that is trained: teacher, student, or one that they depend on."""

    @property
    def context(self) -> Context:
        """Return the run that it is part of, in whose config it may take the place of another net."""
        ...

    @property
    def name(self) -> str:
        """Return the name of its random streams, and of its manifest if it is part of a stage."""
        ...

    @property
    def folder(self) -> str:
        """Return its folder within the run folder."""
        ...

    @property
    def title(self) -> str:
        """Return its name for the user: ``teacher``, ``student``, ``auxiliary``."""
        ...

    @property
    def train(self) -> TrainConfig | None:
        """Return the optimizer and length of its training; None if its weights are used unchanged."""
        ...

    def agent(self) -> AgentConfig:
        """Return its agent; None until it is found."""
        ...

    def make(self) -> Made:
        """Build its nets, its phases and its partners."""
        ...


@dataclass(frozen=True)
class Training:
    """A role's assembled training.

    Args:
        job: The job for the loop; None if the weights are used unchanged.
        made: What the role contributes.
        folder: The role's folder.
    """

    job: Job | None
    made: Made
    folder: Path

    def run(self, progress: Progress) -> FitResult | None:
        """Train to the end (resuming); return None if there is nothing to train."""
        if self.job is not None:
            return fit(self.job, progress, self.made.begin)
        write_text(self.folder / "metrics.jsonl", "")
        return None

    def finish(self, fitted: FitResult | None) -> list[Path]:
        """Write weights and result; return the files of the manifest."""
        chosen = [file] if (file := self.folder / ARITHMETIC).is_file() else []
        return [*self.made.save(), self.folder / "metrics.jsonl", *chosen, *self.made.score(fitted)]

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints of a finished and saved training; keep the last one if requested."""
        store = CheckpointStore(self.folder / "checkpoint", warn=lambda _: None)
        if self.job is not None and self.job.config.keep_checkpoint:
            store.prune(1)
        else:
            store.clear()


def assemble(role: Role) -> Training:
    """Return a role's training, ready to begin.

    Args:
        role: The role; its config gives the length of its training.

    Raises:
        ValueError: If a net, an agent, a loss term or a tap cannot be used.
        FileNotFoundError: If something that it depends on does not exist yet.
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
    """Train a role that is part of the first stage that needs it (resuming), with its own manifest.

    Args:
        role: The role.

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
    return [path for path in files if path.is_file()]  # inverted images have no weights file


def agent_mark(agent: AgentConfig) -> dict[str, str]:
    """Return the hash of the agent's schedule file, if any: a changed schedule makes it another training."""
    return {} if agent.schedule is None else {"schedule": sha256_of(agent.schedule)}
