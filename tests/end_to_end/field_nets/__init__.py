"""Five hundred small nets, as people write them: every kind that once became another function, or failed."""

from . import (
    activations,
    arithmetic,
    blocks,
    dense,
    heads,
    inplace,
    modes,
    moves,
    pools,
    refusals,
    resizing,
    sizes,
    wrapped,
)
from .registry import EXACT, NETS, REFUSED, FieldNet

__all__ = ["EXACT", "NETS", "REFUSED", "FieldNet"]
_ROOMS = (
    activations, arithmetic, blocks, dense, heads, inplace, modes, moves, resizing, pools, refusals, sizes,
    wrapped,
)  # fmt: skip
