"""The further members of a teacher that is an ensemble: trained like the first, from weights of their own."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkd.config import RunConfig
from qkd.data import Splits
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.nets import build_net
from qkd.progress import Progress
from qkd.report.records import read_record
from qkd.roles.agents import agent_inputs, role_agent
from qkd.roles.float_training import keep_last_checkpoint, train_float, write_float
from qkd.roles.nets import WEIGHTS, load_member, member_folder
from qkd.rundir import RunFolder
from qkd.seeding import global_stream
from qkd.training import accuracy


def fresh_teacher(config: RunConfig, splits: Splits, *names: str | int) -> nn.Module:
    """Return the teacher's net with random weights.

    Args:
        config: The run's.
        splits: The images, for their shape.
        *names: Of the random stream.
    """
    with global_stream(config.seed, "init", "teacher", *names):
        return build_net(
            config.teacher.net, classes=len(splits.classes), channels=splits.channels, image_size=splits.image_size
        )


def train_members(run: RunFolder, splits: Splits, device: torch.device, progress: Progress) -> list[Path]:
    """Train the teacher's members but the first (resuming), each in a folder of its own; return their files.

    They differ from the first by seed only: weights, order of the images, augmentation.

    Args:
        run: The run; a searched agent of the teacher's has been found.
        splits: The images, on ``device``.
        device: Where to train.
        progress: Where to talk.

    Raises:
        qkd.training.TrainingError: If a training diverges.
        OSError: If a file cannot be written.
    """
    numbers = range(1, run.config.teacher.members)
    return [path for number in numbers for path in _train_member(run, number, splits, device, progress)]


def _train_member(run: RunFolder, number: int, splits: Splits, device: torch.device, progress: Progress) -> list[Path]:
    config, stage = run.config, f"teacher_member_{number}"
    folder = run.folder(member_folder(run, number).relative_to(run.path).as_posix())
    if run.is_complete(stage):  # its manifest: a part of the teacher stage
        return [folder / WEIGHTS, folder / "metrics.jsonl", folder / "result.json"]
    if config.teacher.train is None:
        raise ValueError("teacher.train: missing; members are trained")
    net = fresh_teacher(config, splits, number)
    fitted = train_float(
        net,
        config.teacher.train,
        role_agent(run, "teacher"),
        role=stage,
        data=config.data,
        splits=splits,
        seed=config.seed,
        device=device,
        folder=folder,
        fingerprint={},
        progress=progress,
    )
    files = write_float(folder, net, config.teacher.net, splits, config.data, fitted, role=stage)
    run.complete(stage, files, agent_inputs(run, "teacher"))
    keep_last_checkpoint(folder)
    return files


def ensemble_results(run: RunFolder, first: nn.Module, splits: Splits, device: torch.device) -> dict[str, Any]:
    """Return what a teacher's ``result.json`` says of its ensemble; nothing for a teacher of one member.

    Keys: ``members`` (accuracies, the first member first), ``members_mean`` and ``members_spread`` (sample standard
    deviation) of the test accuracies, ``ensemble`` (accuracies of the average). Accuracies are fractions.

    Args:
        run: The run; all members but the first are complete.
        first: The first member, trained, on ``device``.
        splits: The images; test images are read.
        device: Where to score.
    """
    teacher = run.config.teacher
    if teacher.members == 1:
        return {}
    folders = [member_folder(run, number) for number in range(1, teacher.members)]
    members = [_accuracies(run, first, splits, device)]
    members += [{key: read_record(folder / "result.json")[key] for key in members[0]} for folder in folders]
    nets = [first, *(load_member(run, number).to(device) for number in range(1, teacher.members))]
    ensemble = EnsembleTeacher(nets, teacher.ensemble, temperature=teacher.ensemble_temperature)
    tests = [member["test_accuracy"] for member in members]
    return {
        "members": members,
        "members_mean": statistics.fmean(tests),
        "members_spread": statistics.stdev(tests),
        "ensemble": {"space": teacher.ensemble, **_accuracies(run, ensemble, splits, device)},
    }


def _accuracies(run: RunFolder, model: nn.Module, splits: Splits, device: torch.device) -> dict[str, Any]:
    parts = {"test_accuracy": splits.test, "val_accuracy": splits.val}
    return {name: accuracy(model, part, splits, run.config.data, device) for name, part in parts.items()}
