"""The float net that an adapting student starts from: adapted in full precision, beside its own copy of the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from qkd.config import PhaseConfig, RunConfig, TrainConfig
from qkd.roles.learner import StudentRole
from qkd.roles.phases import Distillation
from qkd.run.folder import RunFolder
from qkd.training import FitResult


class AdaptedFloatRole(StudentRole):
    """A student in full precision; the teacher that adapts beside it is not kept.

    Args:
        role: Whose start it is.
    """

    def __init__(self, role: StudentRole) -> None:
        context = role.context
        as_student = RunFolder(_float_config(context.config), context.run.path)
        super().__init__(replace(context, run=as_student), name=f"{role.name}_float", folder=f"{role.folder}/float")
        self.title = role.title

    def student(self) -> nn.Module:
        """Return what is trained, on the device."""
        return self.float_net().to(self.context.device)

    def begin(self, student: nn.Module, made: Distillation) -> None:
        """Leave it unchanged: a float net has nothing to calibrate."""

    def save(self, student: nn.Module, teacher: nn.Module, made: Distillation) -> list[Path]:
        """Write the net alone; return the file."""
        return super().save(student, teacher, replace(made, partners=()))

    def score(self, student: nn.Module, teacher: nn.Module, made: Distillation, fitted: FitResult | None) -> list[Path]:
        """Score the net alone; return the file."""
        return super().score(student, teacher, replace(made, partners=()), fitted)

    def details(self) -> Mapping[str, Any]:
        """Return further keys of its result."""
        return {"weight_bits": None, "act_bits": None, "start": "random", "view": "same"}


def _float_config(config: RunConfig) -> RunConfig:
    """Return the config with the float net in the student's place: one phase, batch norm that learns."""
    train = cast(TrainConfig, config.student.float_train)
    phases = (PhaseConfig(name="float", epochs=train.epochs),)
    changes: dict[str, Any] = {
        "init": "random",
        "weights": None,
        "float_train": None,
        "train": train,
        "phases": phases,
        "bn": "train",
        "method": None,
        "method_options": {},
    }
    return config.model_copy(update={"student": config.student.model_copy(update=changes)})
