"""The nets of a run: built for its data, and loaded from what its stages wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qkd.config import QuantConfig, RunConfig
from qkd.files import read_metadata, read_safetensors, write_safetensors
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.nets import build_net, load_weights
from qkd.rundir import RunFolder
from qkd.training.state import fill
from quantizers import QuantSpec, Student, prepare

WEIGHTS = "weights.safetensors"
AUXILIARY = "student/auxiliary"  # folder of the auxiliary teacher
TAUGHT = "student/teacher"  # folder of a teacher that learnt beside the student, as it ended


@dataclass(frozen=True)
class Followed:
    """What the student of a run follows, as far as it is trained.

    Args:
        model: In eval mode, on the CPU; float, or low-bit (an auxiliary).
        net: A name of ``qkd ls nets``.
        words: What it is, for people.
        note: What it is not yet; empty where there is nothing to say.
    """

    model: nn.Module
    net: str
    words: str
    note: str = ""


def load_teacher(run: RunFolder) -> nn.Module:
    """Return the run's teacher (of an ensemble: the first member), in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If there is none yet.
        ValueError: If its file is damaged or of another net.
    """
    return _load_float(run.path / "teacher" / WEIGHTS)


def load_guide(run: RunFolder) -> nn.Module:
    """Return what the student learns from: its auxiliary, or the teacher's ensemble, or the teacher.

    In eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it is not there yet.
        ValueError: If a file is damaged or of another net.
    """
    return load_ensemble(run) if run.config.student.auxiliary is None else load_auxiliary(run)


def load_taught(run: RunFolder) -> nn.Module | None:
    """Return the run's teacher as it ended, where it learnt beside the student; None where it did not, or not yet.

    In eval mode, on the CPU.

    Raises:
        ValueError: If its file is damaged or of another net.
    """
    path = run.path / TAUGHT / WEIGHTS
    return _load_float(path) if path.is_file() else None


def load_followed(run: RunFolder) -> Followed:
    """Return what the student of a run follows: a teacher as it was taught beside it, an auxiliary, an ensemble.

    Raises:
        FileNotFoundError: If the run has no teacher yet.
        ValueError: If a file is damaged or of another net.
    """
    own, student = run.config.teacher, run.config.student
    words = own.net if own.members == 1 else f"{own.net}, an ensemble of {own.members}"
    if (taught := load_taught(run)) is not None:
        return Followed(taught, own.net, f"{own.net}, as it was taught beside the student")
    if student.auxiliary is None:
        note = "the teacher learns beside the student, who is not trained yet: this is how it starts"
        return Followed(load_ensemble(run), own.net, words, note if student.moves_teacher else "")
    if (run.path / AUXILIARY / WEIGHTS).is_file():
        net = student.auxiliary.net or run.config.student_net
        return Followed(load_auxiliary(run), net, f"{net}, an auxiliary that learned from {words}")
    note = "the auxiliary teacher is not trained yet: this is the teacher that it will learn from"
    return Followed(load_ensemble(run), own.net, words, note)


def load_ensemble(run: RunFolder) -> nn.Module:
    """Return the run's teacher as a student learns from it: the average of its members, or its only one.

    In eval mode, on the CPU.

    Raises:
        FileNotFoundError: If one is not there yet.
        ValueError: If a file is damaged or of another net.
    """
    teacher = run.config.teacher
    members = [load_member(run, number) for number in range(teacher.members)]
    if len(members) == 1:
        return members[0]
    return EnsembleTeacher(members, teacher.ensemble, temperature=teacher.ensemble_temperature).eval()


def load_member(run: RunFolder, number: int) -> nn.Module:
    """Return a member of the run's teacher, from 0, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it is not there yet.
        ValueError: If its file is damaged or of another net.
    """
    return _load_float(member_folder(run, number) / WEIGHTS)


def load_auxiliary(run: RunFolder) -> nn.Module:
    """Return the run's auxiliary teacher, low-bit or float, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it is not there yet.
        ValueError: If its file is damaged or of another net.
    """
    auxiliary, path = run.config.student.auxiliary, run.path / AUXILIARY / WEIGHTS
    quant = None if auxiliary is None else auxiliary.quant
    return _load_float(path) if quant is None else _load_low_bit(path, quant)


def guide_files(run: RunFolder) -> list[Path]:
    """Return the weights of what the student learns from, and of the teachers behind it."""
    own = [] if run.config.student.auxiliary is None else [run.path / AUXILIARY / WEIGHTS]
    return [*member_files(run), *own]


def member_files(run: RunFolder) -> list[Path]:
    """Return the weights of the teacher's members, the first one's in ``teacher/`` itself."""
    return [member_folder(run, number) / WEIGHTS for number in range(run.config.teacher.members)]


def member_folder(run: RunFolder, number: int) -> Path:
    """Return the folder of a member of the teacher, from 0; it may not be there yet."""
    return run.path / "teacher" / f"member_{number}" if number else run.path / "teacher"


def load_float_twin(run: RunFolder) -> nn.Module | None:
    """Return the student's net in full precision: the own float training's, the weights it started from, the teacher.

    In eval mode, on the CPU; None where the run has neither.
    """
    own = run.path / "student" / "float" / WEIGHTS
    if own.exists():
        return _load_float(own)
    if run.config.student.weights is not None:
        net = _build(_facts(run.path / "student" / WEIGHTS))
        load_weights(net, run.config.student.weights)
        return net.eval()
    return load_teacher(run) if run.config.student_net == run.config.teacher.net else None


def load_student(run: RunFolder) -> Student:
    """Return the run's trained student, in eval mode (its deployed arithmetic), on the CPU.

    Raises:
        FileNotFoundError: If there is none yet.
        ValueError: If its file is damaged or of another student.
    """
    return _load_low_bit(run.path / "student" / WEIGHTS, run.config.student.quant)


def prepare_student(config: RunConfig, net: nn.Module, *, channels: int, size: int) -> Student:
    """Return the low-bit student of a float net, not calibrated: :func:`prepare_low_bit` as ``student.quant`` says."""
    return prepare_low_bit(config.student.quant, net, channels=channels, size=size)


def prepare_low_bit(quant: QuantConfig, net: nn.Module, *, channels: int, size: int) -> Student:
    """Return the low-bit form of a float net, not calibrated.

    Args:
        quant: How many bits.
        net: The float net; untouched.
        channels: Of the images.
        size: Side of the images in pixels.

    Raises:
        quantizers.RewriteError: If the net cannot be rewritten.
    """
    return prepare(net, QuantSpec(**quant.model_dump()), example_inputs=torch.zeros(2, channels, size, size))


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


def _load_low_bit(path: Path, quant: QuantConfig) -> Student:
    facts = _facts(path)
    student = prepare_low_bit(quant, _build(facts), channels=int(facts["channels"]), size=int(facts["image_size"]))
    try:
        fill(student, read_safetensors(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return student.eval()


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
