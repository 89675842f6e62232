"""The nets of a run: built for its data, and loaded from what its stages wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from qkd.config import RunConfig
from qkd.files import read_metadata, read_safetensors, write_safetensors
from qkd.nets import build_net, load_weights
from qkd.rundir import RunFolder
from qkd.training.state import fill
from quantizers import QuantSpec, Student, prepare

WEIGHTS = "weights.safetensors"


def load_teacher(run: RunFolder) -> nn.Module:
    """Return the run's teacher, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If there is none yet.
        ValueError: If its file is damaged or of another net.
    """
    return _load_float(run.path / "teacher" / WEIGHTS)


def load_float_twin(run: RunFolder) -> nn.Module | None:
    """Return the student's net in full precision: the teacher where the nets agree, else the own float training's.

    In eval mode, on the CPU; None where the run has neither.
    """
    own = run.path / "student" / "float" / WEIGHTS
    if own.exists():
        return _load_float(own)
    return load_teacher(run) if run.config.student_net == run.config.teacher.net else None


def load_student(run: RunFolder) -> Student:
    """Return the run's trained student, in eval mode (its deployed arithmetic), on the CPU.

    Raises:
        FileNotFoundError: If there is none yet.
        ValueError: If its file is damaged or of another student.
    """
    path = run.path / "student" / WEIGHTS
    facts = _facts(path)
    student = prepare_student(run.config, _build(facts), channels=int(facts["channels"]), size=int(facts["image_size"]))
    try:
        fill(student, read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return student.eval()


def prepare_student(config: RunConfig, net: nn.Module, *, channels: int, size: int) -> Student:
    """Return the low-bit student of a float net, not calibrated.

    Args:
        config: Its ``student.quant`` says how many bits.
        net: The float net; untouched.
        channels: Of the images.
        size: Side of the images in pixels.

    Raises:
        quantizers.RewriteError: If the net cannot be rewritten.
    """
    spec = QuantSpec(**config.student.quant.model_dump())
    return prepare(net, spec, example_inputs=torch.zeros(2, channels, size, size))


def save_net(path: Path, model: nn.Module, facts: Mapping[str, str]) -> str:
    """Write a net's weights with the facts that build it again; return the SHA-256 of the file."""
    return write_safetensors(path, model.state_dict(), metadata=facts)


def net_facts(net: str, *, classes: int, channels: int, image_size: int) -> dict[str, str]:
    """Return what :func:`save_net` keeps beside the weights."""
    return {"net": net, "classes": str(classes), "channels": str(channels), "image_size": str(image_size)}


def _load_float(path: Path) -> nn.Module:
    net = _build(_facts(path))
    load_weights(net, path)
    return net.eval()


def _facts(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the stage that writes it first (qkd teacher, qkd distill)")
    facts = read_metadata(path)
    missing = [name for name in ("net", "classes", "channels", "image_size") if name not in facts]
    if missing:
        raise ValueError(f"{path}: was not written by a stage: its header lacks {', '.join(missing)}")
    return facts


def _build(facts: Mapping[str, str]) -> nn.Module:
    sizes = {name: int(facts[name]) for name in ("classes", "channels", "image_size")}
    return build_net(facts["net"], **sizes)
