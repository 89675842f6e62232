"""What the student of a run learns from: its teacher, or what a method uses instead."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qkd.methods.method import Guide
from qkd.methods.table import methods_of
from qkd.nets.own.spelling import net_title
from qkd.roles.nets import load_float, load_teacher
from qkd.run.folder import RunFolder
from qkd.training.assembly import WEIGHTS

TAUGHT = "student/teacher"  # folder of the final state of a teacher that learned along with the student


@dataclass(frozen=True)
class Followed:
    """What the student of a run learned from, or will learn from.

    Args:
        model: In eval mode, on the CPU; float or low-bit.
        net: A name of ``qkd ls nets``.
        words: A description for the user.
        note: What is still missing; empty if nothing is.
        is_teacher: Whether it was trained as ``teacher.train`` says: the teacher, or an ensemble of such.
    """

    model: nn.Module
    net: str
    words: str
    note: str = ""
    is_teacher: bool = True


def guide_of(run: RunFolder) -> Guide:
    """Return what the student of a run learns from."""
    net = run.config.teacher_net
    guide = Guide(lambda: load_teacher(run), (run.path / "teacher" / WEIGHTS,), net, net_title(net))
    for method in methods_of(run.config):
        guide = method.guide(run, guide)
    return guide


def load_guide(run: RunFolder) -> nn.Module:
    """Return what the student learns from, in eval mode, on the CPU.

    Raises:
        FileNotFoundError: If it does not exist yet.
        ValueError: If a file is damaged or of another net.
    """
    return guide_of(run).load()


def load_taught(run: RunFolder) -> nn.Module | None:
    """Return the final state of a teacher that learned along with the student; None if it did not, or not yet.

    It is in eval mode, on the CPU.

    Raises:
        ValueError: If its file is damaged or of another net.
    """
    path = run.path / TAUGHT / WEIGHTS
    return load_float(path) if path.is_file() else None


def load_followed(run: RunFolder) -> Followed:
    """Return what the student of a run learned from: the teacher taught along with it, or what it learns from.

    Raises:
        FileNotFoundError: If the run has no teacher yet.
        ValueError: If a file is damaged or of another net.
    """
    own = run.config.teacher_net
    if (taught := load_taught(run)) is not None:
        return Followed(taught, own, f"{net_title(own)}, taught along with the student")
    guide, note = guide_of(run), ""
    while guide.below is not None and not guide.files[-1].is_file():
        guide, note = guide.below, guide.untrained
    if not note and any(method.trains_teacher for method in methods_of(run.config)):
        note = "the teacher learns along with the student, which is not trained yet; this is its initial state"
    return Followed(guide.load(), guide.net, guide.words, note, is_teacher=guide.below is None)
