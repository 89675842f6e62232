"""A float net in the student's place, for methods that train one themselves for the student to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from qkd.config import PhaseConfig, RunConfig, TrainConfig
from qkd.roles.learner import StudentRole
from qkd.roles.phases import Distillation
from qkd.run.folder import RunFolder


class FloatTwinRole(StudentRole):
    """A student in full precision, which learns like the low-bit one.

    Args:
        role: The student that starts from it.
        config: The config with the float net in the student's place (:func:`float_twin_config`).
    """

    def __init__(self, role: StudentRole, config: RunConfig) -> None:
        context = role.context
        as_student = RunFolder(config, context.run.path)
        super().__init__(replace(context, run=as_student), name=f"{role.name}_float", folder=f"{role.folder}/float")
        self.title = role.title

    def student(self) -> nn.Module:
        """Return what is trained, on the device."""
        return self.float_net().to(self.context.device)

    def begin(self, student: nn.Module, made: Distillation) -> None:
        """Initialize what the methods train along with it; a float net has nothing to calibrate."""
        self.begin_methods()

    def details(self) -> Mapping[str, Any]:
        """Return more keys of its result."""
        return {"weight_bits": None, "act_bits": None, "start": "random", "view": "same"}


def float_twin_config(config: RunConfig, **changes: Any) -> RunConfig:
    """Return a config with the float net in the student's place, with one phase and trainable batch norm.

    Args:
        config: The run's config; its ``student.float_train`` is set.
        changes: More keys of the student's section.
    """
    train = cast(TrainConfig, config.student.float_train)
    own: dict[str, Any] = {
        "init": "random",
        "weights": None,
        "float_train": None,
        "agent": config.student.float_agent or config.student.agent,
        "float_agent": None,
        "train": train,
        "phases": (PhaseConfig(name="float", epochs=train.epochs),),
        "bn": "train",
        "method": None,
        "method_options": {},
    }
    return config.model_copy(update={"student": config.student.model_copy(update={**own, **changes})})
