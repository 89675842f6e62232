"""Auxiliary branches of a run: built, trained behind the finished teacher, kept, and wired into a distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qkd.agents import build_agent
from qkd.config import RotationsConfig, RunConfig, TrainConfig
from qkd.data import Splits
from qkd.files import read_safetensors, sha256_of
from qkd.losses.turns import TURNS
from qkd.methods.rotations.branched import BranchClassifier, BranchedNet
from qkd.methods.rotations.step import BranchStep, PeerStep, RotationStep
from qkd.nets.branches import build_branches, stage_names
from qkd.progress import Progress
from qkd.roles.agents import agent_inputs, agent_mark, role_agent, training_settings
from qkd.roles.float_training import keep_last_checkpoint
from qkd.roles.nets import WEIGHTS, load_teacher, net_facts, save_net
from qkd.roles.outcome import score, write_outcome
from qkd.rundir import RunFolder
from qkd.seeding import global_stream
from qkd.terms.modules import feature_shapes
from qkd.training import Batch, FitResult, Job, Partner, Phase, fit
from qkd.training.state import fill
from quantizers import Student

STAGE = "teacher_branches"  # its manifest: a part of the stage that needs them first
JOINT_FILE = "branches.safetensors"  # beside the teacher's weights, where both learnt together

Role = Literal["teacher", "student"]


@dataclass(frozen=True)
class Rotations:
    """What a distillation on turned images is made of.

    Args:
        step: Of every phase without loss terms of its own.
        partners: Nets that learn beside the student.
        enter: Puts nets and branches into the modes that the step needs.
    """

    step: RotationStep | PeerStep
    partners: tuple[Partner, ...]
    enter: Callable[[], None]


def is_joint(config: RunConfig) -> bool:
    """Return whether the teacher's branches learn with it, in its own training."""
    own = config.student.rotations
    return own is not None and own.teacher_branches is not None and own.teacher_branches.joint


def own_training(config: RunConfig) -> TrainConfig | None:
    """Return how the teacher's branches learn behind the finished teacher; None where they do not."""
    own = config.student.rotations
    return None if own is None or own.teacher_branches is None else own.teacher_branches.train


def taps_of(config: RunConfig, net: nn.Module, role: Role) -> tuple[str, ...]:
    """Return the modules of a role's float net that branches read.

    Raises:
        ValueError: If the config has no rotations, or names no taps and the net has no stages of residual blocks.
    """
    own = _settings(config)
    named = own.student_taps if role == "student" else own.teacher_taps
    taps = named or stage_names(net)
    if not taps:
        raise ValueError(
            f"student.rotations.{role}_taps: the {role}'s net has no stages of residual blocks to read; "
            f"name modules that give maps, from the input to the output"
        )
    return taps


def fresh_branches(config: RunConfig, net: nn.Module, splits: Splits, role: Role) -> nn.ModuleList:
    """Return a role's branches with random weights from the run's seed, on the net's device.

    Args:
        config: Its ``student.rotations`` names the taps.
        net: The role's float net; untouched.
        splits: The images, for their shape and classes.
        role: Whose.

    Raises:
        ValueError: If a tap cannot be used.
    """
    device = next(net.parameters()).device
    taps = taps_of(config, net, role)
    images = torch.zeros(2, splits.channels, splits.image_size, splits.image_size, device=device)
    shapes = feature_shapes(net, taps, images, role=role)
    with global_stream(config.seed, "init", f"{role} branches"):
        branches = build_branches(net, taps, [shapes[tap] for tap in taps], outputs=TURNS * len(splits.classes))
    return branches.to(device)


def branched_teacher(config: RunConfig, teacher: nn.Module, branches: nn.ModuleList) -> BranchedNet:
    """Return a teacher with its branches."""
    return BranchedNet(teacher, branches, taps_of(config, teacher, "teacher"), role="teacher")


def branches_file(run: RunFolder) -> Path | None:
    """Return where the run's trained branches of its teacher lie; None where the config has none."""
    if is_joint(run.config):
        return run.path / "teacher" / JOINT_FILE
    return run.path / "student" / STAGE / WEIGHTS if own_training(run.config) is not None else None


def branches_mark(run: RunFolder) -> dict[str, str]:
    """Return the hash of the teacher's branches, if it has them: other branches make another training."""
    path = branches_file(run)
    return {} if path is None else {STAGE: sha256_of(path)}


def save_branches(path: Path, branches: nn.ModuleList, config: RunConfig, splits: Splits) -> Path:
    """Write the branches of the run's teacher; return the file."""
    sizes = {"classes": len(splits.classes), "channels": splits.channels, "image_size": splits.image_size}
    save_net(path, branches, net_facts(config.teacher.net, **sizes))
    return path


def load_branches(run: RunFolder, teacher: nn.Module, splits: Splits) -> nn.ModuleList | None:
    """Return the trained branches of the run's teacher, on its device; None where the config has none.

    Raises:
        FileNotFoundError: If they are not there yet.
        ValueError: If their file is damaged, or was made for other taps.
    """
    path = branches_file(run)
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it first (qkd teacher, qkd distill)")
    branches = fresh_branches(run.config, teacher, splits, "teacher")
    try:
        fill(branches, read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return branches


def train_branches(run: RunFolder, splits: Splits, device: torch.device, progress: Progress) -> list[Path]:
    """Train the branches behind the run's finished teacher where the config says so (resuming); return their files.

    Args:
        run: The run; its teacher is complete, and stays as it is.
        splits: Its images, on ``device``.
        device: Where to train.
        progress: Where to talk.

    Raises:
        ValueError: If a tap cannot be used.
        qkd.training.TrainingError: If the training diverges.
        OSError: If a file cannot be written.
    """
    train = own_training(run.config)
    if train is None:
        return []
    folder = run.folder(f"student/{STAGE}")
    files = [folder / name for name in (WEIGHTS, "metrics.jsonl", "result.json")]
    if run.is_complete(STAGE):
        return files
    teacher = load_teacher(run).to(device).requires_grad_(False)
    branches = fresh_branches(run.config, teacher, splits, "teacher")
    model = BranchClassifier(branched_teacher(run.config, teacher, branches))
    fitted = fit(_job(run, splits, device, model, teacher, train, folder), progress)
    save_branches(folder / WEIGHTS, branches, run.config, splits)
    _write_result(run, model, splits, fitted, folder)
    run.complete(STAGE, files, [run.path / "teacher" / WEIGHTS, *agent_inputs(run, "teacher")])
    keep_last_checkpoint(folder)
    return files


def joint_training(config: RunConfig, net: nn.Module, branches: nn.ModuleList) -> dict[str, Any]:
    """Return what the teacher's own training needs to train branches along: its phase and its partner.

    Raises:
        ValueError: If a tap names no module, or the config does not train the teacher.
    """
    train = config.teacher.train
    if train is None:
        raise ValueError("teacher.train: missing; joint branches learn with the teacher")
    step = BranchStep(branched_teacher(config, net, branches), joint=True, label_smoothing=train.label_smoothing)
    phase = Phase("with branches", train.epochs, step, _modes(train=[branches], fix=[]), step.tapped)
    return {"phase": phase, "partners": (Partner("branches", branches),)}


def rotations(
    config: RunConfig,
    student: Student,
    teacher: nn.Module,
    branches: nn.ModuleList | None,
    view: Callable[[Batch], Tensor] | None,
    *,
    net: nn.Module,
    splits: Splits,
) -> Rotations:
    """Return the step of a distillation on turned images, and the nets that learn beside the student.

    Args:
        config: Its ``student.rotations`` says how.
        student: The net that is trained.
        teacher: Offline it is only read; online it is the peer, and learns, too.
        branches: Of the teacher, trained; online None: the peer's branches begin with random weights.
        view: Gives the teacher's images; None where it sees the student's.
        net: The student's float net, whose structure its branches copy.
        splits: The images, for their shape and classes.

    Raises:
        ValueError: If taps cannot be used, or the teacher's trained branches are missing.
    """
    own, smoothing = _settings(config), config.student.train.label_smoothing
    mine = fresh_branches(config, net, splits, "student")
    taps = taps_of(config, net, "student")
    learner = BranchedNet(student, mine, taps, tap_paths=student.tap_paths, role="student")
    if own.mode == "offline":
        if branches is None:
            raise ValueError("offline rotations learn from the teacher's trained branches, but there are none")
        branches.requires_grad_(False)
        offline = RotationStep(
            learner, branched_teacher(config, teacher, branches), own, label_smoothing=smoothing, view=view
        )
        return Rotations(offline, (Partner("branches", mine),), _modes(train=[mine], fix=[teacher, branches]))
    others = fresh_branches(config, teacher, splits, "teacher")
    online = PeerStep(learner, branched_teacher(config, teacher, others), own, label_smoothing=smoothing, view=view)
    partners = (Partner("branches", mine), Partner("teacher", teacher), Partner("teacher_branches", others))
    return Rotations(online, partners, _modes(train=[mine, teacher, others], fix=[]))


def _settings(config: RunConfig) -> RotationsConfig:
    if config.student.rotations is None:
        raise ValueError("student.rotations: missing")
    return config.student.rotations


def _modes(*, train: list[nn.Module], fix: list[nn.Module]) -> Callable[[], None]:
    def enter() -> None:
        for module in train:
            module.train()
        for module in fix:
            module.eval()

    return enter


def _job(
    run: RunFolder,
    splits: Splits,
    device: torch.device,
    model: BranchClassifier,
    teacher: nn.Module,
    train: TrainConfig,
    folder: Path,
) -> Job:
    config, agent = run.config, role_agent(run, "teacher")
    step = BranchStep(model.branched, joint=False, label_smoothing=train.label_smoothing)
    return Job(
        role=STAGE,
        model=model,
        config=train,
        data=config.data,
        splits=splits,
        agent=build_agent(agent, epochs=train.epochs, mean=splits.mean),
        phases=(Phase("branches", train.epochs, step, _modes(train=[], fix=[teacher]), step.tapped),),
        seed=config.seed,
        device=device,
        folder=folder,
        fingerprint={
            "data": splits.fingerprint,
            "teacher": sha256_of(run.path / "teacher" / WEIGHTS),
            **agent_mark(agent),
        },
        settings=training_settings(config),
        others={"teacher": teacher},
    )


def _write_result(run: RunFolder, model: BranchClassifier, splits: Splits, fitted: FitResult, folder: Path) -> Path:
    config, taps = run.config, model.branched.paths
    outcome = score("teacher branches", config.teacher.net, model, splits, config.data, fitted, taps=taps)
    return write_outcome(folder, outcome)
