"""The float net that an adapting student starts from: adapted in full precision, with its own copy of the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from qkd.roles.float_twin import FloatTwinRole, float_twin_config
from qkd.roles.learner import StudentRole
from qkd.roles.phases import Distillation
from qkd.training import FitResult


class AdaptedFloatRole(FloatTwinRole):
    """A full-precision student; the teacher that adapts with it is not kept.

    Args:
        role: The student role that starts from it.
    """

    def __init__(self, role: StudentRole) -> None:
        super().__init__(role, float_twin_config(role.config))

    def save(self, student: nn.Module, teacher: nn.Module, made: Distillation) -> list[Path]:
        """Write the net alone; return the file."""
        return super().save(student, teacher, replace(made, partners=()))

    def score(self, student: nn.Module, teacher: nn.Module, made: Distillation, fitted: FitResult | None) -> list[Path]:
        """Score the net alone; return the file."""
        return super().score(student, teacher, replace(made, partners=()), fitted)
