"""Distillation: losses as pure functions, their weighted sum, and taps that read features."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.distill.losses import cross_entropy_loss, similarity_preserving_loss, soft_target_loss
    from qkd.distill.phase_checks import phase_faults
    from qkd.distill.table import LOSSES, LossEntry, Option
    from qkd.distill.taps import Taps, dequantised
    from qkd.distill.term_checks import check_terms
    from qkd.distill.terms import Outputs, WeightedTerms, build_terms
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = [
    "LOSSES",
    "LossEntry",
    "Option",
    "Outputs",
    "Taps",
    "WeightedTerms",
    "build_terms",
    "check_terms",
    "cross_entropy_loss",
    "dequantised",
    "phase_faults",
    "similarity_preserving_loss",
    "soft_target_loss",
]
