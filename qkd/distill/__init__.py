"""The function :func:`qkd.api.distill` if called; otherwise old names of `qkd.losses` and `qkd.terms`."""

from export.moved import OLD_NAMES
from qkd.api.rooms import callable_room
from qkd.moved import moved

PLACES = {
    "LOSSES": "qkd.terms",
    "LossEntry": "qkd.terms",
    "Option": "qkd.terms",
    "Outputs": "qkd.terms",
    "Taps": "qkd.terms",
    "WeightedTerms": "qkd.terms",
    "build_terms": "qkd.terms",
    "check_terms": "qkd.terms",
    "cross_entropy_loss": "qkd.losses",
    **dict.fromkeys(OLD_NAMES["qkd.terms"], "qkd.terms"),
    "phase_faults": "qkd.methods.phase_checks",
    "similarity_preserving_loss": "qkd.losses",
    "soft_target_loss": "qkd.losses",
}

callable_room(__name__)
__getattr__ = moved("qkd.distill", PLACES)
__all__ = list(PLACES)
