"""Spells what an in-place operation writes into its target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from quantizers.graph.form.refusal import NoSpelling
from quantizers.graph.spelling.call import Call, spelled
from quantizers.graph.spelling.moves import view_moves
from quantizers.graph.spelling.pen import Pen, Value
from quantizers.graph.spelling.table import OPERATORS


def mutated(pen: Pen, name: str, values: dict[str, Any], target: Tensor) -> Value | Tensor:
    """Return what an in-place operation writes into its target.

    Args:
        pen: Where to write.
        name: Name of the operation, without the in-place suffix.
        values: Its arguments by name.
        target: The tensor that it writes into.

    Raises:
        NoSpelling: If the closed set of modules cannot express it.
    """
    if name in ("copy", "fill", "zero"):
        source = values.get("src", values.get("value", 0))
        if not isinstance(source, Value):
            return torch.as_tensor(source, dtype=target.dtype).expand(target.shape).clone()
        if source.shape != tuple(target.shape):
            for move in view_moves(Call("expand", {}, (tuple(target.shape),)), source.shape)[0]:
                source = pen.emit(move, source, aside=True)
        return source
    is_refused = any(isinstance(v, Value) and "refused" in v.node.meta for v in pytree.tree_leaves(values))
    if name not in OPERATORS or is_refused:
        raise NoSpelling
    made: Value = spelled(OPERATORS[name], pen, Call(name, values, (tuple(target.shape),)))
    return made
