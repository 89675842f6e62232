"""Auxiliary branches of a run: built, kept and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from torch import nn

from qkd.config import RotationsConfig, RunConfig, TrainConfig
from qkd.data import Splits
from qkd.files import read_safetensors
from qkd.losses.turns import TURNS
from qkd.methods.rotations.branched import BranchedNet
from qkd.nets.branches import build_branches, stage_names
from qkd.roles.nets import blank_images, net_facts, save_net, sizes_of
from qkd.run.folder import RunFolder
from qkd.seeding import global_stream
from qkd.terms.modules import feature_shapes
from qkd.training.assembly import WEIGHTS
from qkd.training.state import fill

STAGE = "teacher_branches"  # its manifest, part of the first stage that needs them
JOINT_FILE = "branches.safetensors"  # next to the teacher's weights, if both learned together

Role = Literal["teacher", "student"]


def is_joint(config: RunConfig) -> bool:
    """Return whether the teacher's branches learn with it, in its own training."""
    branches = _settings(config).teacher_branches
    return branches is not None and branches.joint


def own_training(config: RunConfig) -> TrainConfig | None:
    """Return the training of branches on the finished teacher, or None if there is none."""
    branches = _settings(config).teacher_branches
    return None if branches is None else branches.train


def taps_of(config: RunConfig, net: nn.Module, role: Role) -> tuple[str, ...]:
    """Return the modules of a role's float net that branches read.

    Raises:
        ValueError: If the config names no taps and the net has no stages of residual blocks.
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
        role: The role of the net.

    Raises:
        ValueError: If a tap cannot be used.
    """
    device = next(net.parameters()).device
    taps = taps_of(config, net, role)
    shapes = feature_shapes(net, taps, blank_images(splits, device), role=role)
    with global_stream(config.seed, "init", f"{role} branches"):
        branches = build_branches(net, taps, [shapes[tap] for tap in taps], outputs=TURNS * len(splits.classes))
    return branches.to(device)


def branched_teacher(config: RunConfig, teacher: nn.Module, branches: nn.ModuleList) -> BranchedNet:
    """Return a teacher with its branches."""
    return BranchedNet(teacher, branches, taps_of(config, teacher, "teacher"), role="teacher")


def branches_file(run: RunFolder) -> Path | None:
    """Return the path of the trained branches of the run's teacher; None if the config has none."""
    if is_joint(run.config):
        return run.path / "teacher" / JOINT_FILE
    return run.path / "student" / STAGE / WEIGHTS if own_training(run.config) is not None else None


def save_branches(path: Path, branches: nn.ModuleList, config: RunConfig, splits: Splits) -> Path:
    """Write the branches of the run's teacher; return the file."""
    save_net(path, branches, net_facts(config.teacher_net, **sizes_of(splits)))
    return path


def load_branches(run: RunFolder, teacher: nn.Module, splits: Splits) -> nn.ModuleList | None:
    """Return the trained branches of the run's teacher, on its device; None if the config has none.

    Raises:
        FileNotFoundError: If they do not exist yet.
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


def _settings(config: RunConfig) -> RotationsConfig:
    return cast(RotationsConfig, config.student.rotations)
