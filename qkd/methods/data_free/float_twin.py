"""The float net that a data-free student starts from: distilled from the same made images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import nn

from qkd.config import LowBitConfig, PhaseConfig, RunConfig, TrainConfig
from qkd.roles.learner import StudentRole
from qkd.roles.phases import Distillation
from qkd.run.folder import RunFolder
from qkd.run.identity import differences, identity

FLOAT = "student_float"  # manifest of the training
_WITHOUT_SAY = ("student.quant.", "teacher.run")  # keys that do not change a float net's training


class DataFreeFloatRole(StudentRole):
    """A student in full precision.

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

    def details(self) -> Mapping[str, Any]:
        """Return further keys of its result."""
        return {"weight_bits": None, "act_bits": None, "start": "random", "view": "same"}


def is_same_twin(one: RunConfig, other: RunConfig) -> bool:
    """Return whether two runs whose images come from one generator or pool have the same float student.

    Args:
        one: Config of a run.
        other: Likewise; their students may differ in widths, and in the low-bit training.
    """
    if one.student_start != "float" or other.student_start != "float":
        return False
    then, now = (identity(_float_config(config).model_dump(mode="json", warnings=False)) for config in (one, other))
    return all(key.startswith(_WITHOUT_SAY) for key in differences(then, now))


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
        "low_bit": LowBitConfig(),  # the low-bit student's own, as is the next
        "self_distillation": None,
        "peers": None,
        "auxiliary": None,
        "bn": "train",
        "method": None,
        "method_options": {},
    }
    return config.model_copy(update={"student": config.student.model_copy(update=changes)})
