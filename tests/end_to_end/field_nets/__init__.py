"""About two hundred small nets, as people write them: every kind that once became another function, or failed."""

from . import (
    activations,
    arithmetic,
    blocks,
    dense,
    heads,
    inplace,
    modes,
    moves,
    pads,
    pools,
    refusals,
    sizes,
    upsampling,
    wrapped,
)
from .registry import EITHER, EXACT, NETS, REFUSED, FieldNet

__all__ = ["EITHER", "EXACT", "NETS", "REFUSED", "FieldNet"]
_ROOMS = (
    activations, arithmetic, blocks, dense, heads, inplace, modes, moves, pads, pools, refusals, sizes, upsampling,
    wrapped,
)  # fmt: skip
