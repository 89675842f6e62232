"""Train a float net by itself: the teacher, or the float net that a student starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkd.agents import build_agent
from qkd.config import AgentConfig, DataConfig, TrainConfig
from qkd.data import Splits
from qkd.progress import Progress
from qkd.run.folder import RunFolder
from qkd.run.identity import leaves
from qkd.stages.models import WEIGHTS, net_facts, save_net
from qkd.stages.outcome import score, write_outcome
from qkd.stages.role_agents import agent_mark
from qkd.training import FitResult, Job, Partner, Phase, fit, supervised_step
from qkd.training.checkpoint import CheckpointStore


def train_float(
    net: nn.Module,
    train: TrainConfig,
    agent: AgentConfig,
    *,
    role: str,
    data: DataConfig,
    splits: Splits,
    seed: int,
    device: torch.device,
    folder: Path,
    fingerprint: dict[str, str],
    progress: Progress,
    phase: Phase | None = None,
    partners: tuple[Partner, ...] = (),
) -> FitResult:
    """Train ``net`` in place, resuming from ``folder``; arguments as in :class:`qkd.training.Job`.

    ``phase`` says how; absent: on the labels alone.
    """
    step = supervised_step(net, label_smoothing=train.label_smoothing)
    job = Job(
        role=role,
        model=net.to(device),
        config=train,
        data=data,
        splits=splits,
        agent=build_agent(agent, epochs=train.epochs, mean=splits.mean),
        phases=(phase or Phase("supervised", train.epochs, step),),
        seed=seed,
        device=device,
        folder=folder,
        fingerprint={**fingerprint, "data": splits.fingerprint, **agent_mark(agent)},
        settings=dict(leaves(agent.model_dump(mode="json", exclude={"schedule"}), "agent")),
        partners=partners,
    )
    return fit(job, progress)


def write_float(
    folder: Path, net: nn.Module, name: str, splits: Splits, data: DataConfig, fitted: FitResult | None, **details: Any
) -> list[Path]:
    """Write weights and result of a trained float net; return the files of its manifest."""
    facts = net_facts(name, classes=len(splits.classes), channels=splits.channels, image_size=splits.image_size)
    save_net(folder / WEIGHTS, net, facts)
    result = write_outcome(folder, score(details.pop("role"), name, net, splits, data, fitted, **details))
    return [folder / WEIGHTS, folder / "metrics.jsonl", result]


def warn_of_another_environment(run: RunFolder, progress: Progress) -> None:
    """Say how this process differs from the one that made the run folder: resumed bits may differ, too."""
    for change in run.environment_changes():
        progress.warn(f"not what the run was begun with: {change}; what follows may differ in the last bits")


def keep_last_checkpoint(folder: Path) -> None:
    """Delete all but the last checkpoint of a training that is done: it can still bring back altered weights."""
    CheckpointStore(folder / "checkpoint", warn=lambda _: None).prune(1)
