"""The table of losses, their weighted sum as described by a config, and what a step needs: taps, modules, gradients."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.terms.loss_table import LOSSES, LossEntry, Option
    from qkd.terms.taps import Taps, dequantized
    from qkd.terms.term_checks import check_terms
    from qkd.terms.weighting import Outputs, WeightedTerms, build_terms
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
    "dequantized",
]
