"""Write operations that only move values as ONNX nodes; on stored codes, so that they are exact and need no fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from export.checks import ExportError
from export.graph.builder import GraphBuilder
from quantizers.integer import Shape

INT64_MAX = 2**63 - 1

Zero = Callable[[], str]  # makes the stored scalar that represents real zero
Writer = Callable[["_Move"], str]


class _Move:
    """One move on its way into the graph."""

    def __init__(self, graph: GraphBuilder, node: Shape, stored: str, zero: Zero) -> None:
        self.graph, self.node, self.stored, self.zero = graph, node, stored, zero
        self.settings: Any = node.attributes

    def integers(self, key: str, values: object) -> str:
        return self.graph.constant(f"{self.node.name}.{key}", np.array(values, np.int64))

    def add(self, operator: str, inputs: Sequence[str] = (), **attributes: Any) -> str:
        inputs = [self.stored, *inputs]
        return self.graph.add(operator, inputs, self.node.output, name=self.node.name, **attributes)


def write_move(graph: GraphBuilder, node: Shape, stored: str, zero: Zero) -> str:
    """Add the node of a move to a graph.

    Args:
        graph: The graph to add to.
        node: The move, with its attributes.
        stored: Name of the tensor that is moved.
        zero: Gives what padding fills in.

    Returns:
        Name of the output tensor.

    Raises:
        ExportError: If the move is not known, or lacks an attribute.
    """
    if node.op not in MOVE_WRITERS:
        raise ExportError(f"{node.name}: no ONNX form is known for {node.op!r}")
    try:
        return MOVE_WRITERS[node.op](_Move(graph, node, stored, zero))
    except KeyError as missing:
        raise ExportError(f"{node.name}: {node.op} needs the attribute {missing}") from missing


def _flatten(move: _Move) -> str:
    axis = int(move.settings.get("axis", 1))
    if axis < 1:
        raise ExportError(f"{move.node.name}: flatten must leave the batch alone, got axis={axis}")
    if axis == 1:
        return move.add("Flatten", axis=1)
    # ONNX's Flatten always gives two axes; PyTorch keeps those before the first one flattened
    return move.add("Reshape", [move.integers("shape", [0] * axis + [-1])])


def _slice(move: _Move) -> str:
    end = move.settings.get("end")
    bounds = {
        "starts": move.settings["start"],
        "ends": INT64_MAX if end is None else end,
        "axes": move.settings["axis"],
        "steps": move.settings.get("step", 1),
    }
    if bounds["steps"] == 1:
        del bounds["steps"]
    return move.add("Slice", [move.integers(key, [value]) for key, value in bounds.items()])


def _gather(move: _Move) -> str:
    return move.add("Gather", [move.integers("indices", move.settings["indices"])], axis=move.settings["axis"])


def _pad(move: _Move) -> str:
    pads = move.integers("pads", [*move.settings["before"], *move.settings["after"]])
    return move.add("Pad", [pads, move.zero()])


MOVE_WRITERS: dict[str, Writer] = {
    "expand": lambda move: move.add("Expand", [move.integers("shape", move.settings["shape"])]),
    "flatten": _flatten,
    "gather": _gather,
    "identity": lambda move: move.stored,
    "pad": _pad,
    "reshape": lambda move: move.add("Reshape", [move.integers("shape", move.settings["shape"])]),
    "slice": _slice,
    "transpose": lambda move: move.add("Transpose", perm=list(move.settings["perm"])),
}
