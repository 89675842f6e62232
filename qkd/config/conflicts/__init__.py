"""Keys of a config that are each valid by themselves, but do not go together."""

from qkd.config.conflicts.federated import FEDERATED_STUDENT, federated_faults
from qkd.config.conflicts.idle import MOST_BITS, idle_faults
from qkd.config.conflicts.real_images import data_free_faults
from qkd.config.conflicts.roles import method_faults
from qkd.config.conflicts.student import low_bit_faults

__all__ = [
    "FEDERATED_STUDENT",
    "MOST_BITS",
    "data_free_faults",
    "federated_faults",
    "idle_faults",
    "low_bit_faults",
    "method_faults",
]
