"""Old names of `qkd.losses`."""

from qkd import losses
from qkd.moved import moved

PLACES = dict.fromkeys(losses.__all__, "qkd.losses")

__getattr__ = moved("qkd.distill.losses", PLACES)
__all__ = list(PLACES)
