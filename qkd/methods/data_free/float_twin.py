"""The float net that a data-free student starts from: distilled from the same made images."""

from __future__ import annotations

from typing import cast

from qkd.config import LowBitConfig, RunConfig
from qkd.config.data_free import DataFreeConfig
from qkd.roles.float_twin import FloatTwinRole, float_twin_config
from qkd.roles.learner import StudentRole
from qkd.run.identity import different_settings

FLOAT = "student_float"  # manifest of the training
_WITHOUT_SAY = ("student.quant.", "teacher.run")  # keys that do not change a float net's training


class DataFreeFloatRole(FloatTwinRole):
    """A full-precision student.

    Args:
        role: The student role that starts from it.
    """

    def __init__(self, role: StudentRole) -> None:
        super().__init__(role, _float_config(role.config))


def is_same_twin(one: RunConfig, other: RunConfig) -> bool:
    """Return whether two runs that share a generator or pool have the same float student.

    Args:
        one: Config of a run.
        other: Likewise; their students may differ in widths, and in the low-bit training.
    """
    if one.student_start != "float" or other.student_start != "float":
        return False
    return all(key.startswith(_WITHOUT_SAY) for key in different_settings(*map(_float_config, (one, other))))


def _float_config(config: RunConfig) -> RunConfig:
    """Return the config with the float net in place of the student, without the low-bit student's own settings."""
    settings = cast(DataFreeConfig, config.student.data_free).of_float_student()
    return float_twin_config(
        config, data_free=settings, low_bit=LowBitConfig(), self_distillation=None, peers=None, auxiliary=None
    )
