"""The table of losses, their weighted sum as a config describes it, and what a step needs: taps, modules, gradients."""

from qkd.terms.loss_table import LOSSES, LossEntry, Option
from qkd.terms.taps import Taps, dequantised
from qkd.terms.weighting import Outputs, WeightedTerms, build_terms, check_terms

__all__ = [
    "LOSSES",
    "LossEntry",
    "Option",
    "Outputs",
    "Taps",
    "WeightedTerms",
    "build_terms",
    "check_terms",
    "dequantised",
]
