"""Give the functions and tensor methods that a student's graph may still call as nodes of the integer view.

The front end spells a float network with modules; what it leaves as it stood is read here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from quantizers import integer as ir
from quantizers.graph.trace import FUNCTION_NAMES, RewriteError

Common = tuple[str, tuple[str, ...], str]  # name, input edges, output edge
Edges = dict[fx.Node, Any]
RESHAPES = ("view", "reshape", "flatten", "squeeze", "unsqueeze")
COPIES = ("contiguous", "clone")


def view_spelling(node: fx.Node, edges: Edges, add: Callable[[ir.Node], None]) -> None:
    """Add the nodes of one call that is no module's, and note its edge; sizes and arithmetic on them have none.

    Args:
        node: Of the student's graph.
        edges: Node -> edge so far (a list of edges for chunks); receives this one's.
        add: Takes each node of the view.

    Raises:
        RewriteError: If the operation has no place in the view.
    """
    if node.meta.get("shape") is None:
        return
    label = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if label in ("chunk", "split"):
        edges[node] = _pieces(node, edges[node.all_input_nodes[0]], add)
    elif node.target is operator.getitem:
        edges[node] = _piece(node, edges)
    else:
        inputs = tuple(edges[n] for n in node.all_input_nodes if n.meta.get("shape") is not None)
        add(_single(node, label, (node.name, inputs, node.name)))
        edges[node] = node.name


def _single(node: fx.Node, label: str, common: Common) -> ir.Node:
    if label in RESHAPES:
        return ir.Shape(*common, "reshape", {"shape": (-1, *node.meta["shape"][1:])})
    if label in ("permute", "transpose"):
        return ir.Shape(*common, "transpose", {"perm": _permutation(node, label)})
    if label in COPIES:
        return ir.Shape(*common, "identity")
    target: Any = node.target
    if target in FUNCTION_NAMES:
        return ir.Function(*common, FUNCTION_NAMES[target], _arguments(node))
    if label in ("relu", "relu_", "relu6"):
        return ir.Function(*common, "relu6" if label == "relu6" else "relu")
    raise RewriteError(f"{node.name}: {label} has no place in the integer view")


def _pieces(node: fx.Node, edge: str, add: Callable[[ir.Node], None]) -> list[str]:
    axis = _dimension(node, 2, "dim") % len(node.meta["shape"][0])
    pieces, start = [], 0
    for index, shape in enumerate(node.meta["shape"]):
        end = start + shape[axis]
        attributes = {"axis": axis, "start": start, "end": end, "step": 1}
        piece = ir.Shape(f"{node.name}.{index}", (edge,), f"{node.name}_{index}", "slice", attributes)
        start = end
        pieces.append(piece.output)
        add(piece)
    return pieces


def _piece(node: fx.Node, edges: Edges) -> str:
    source, index = node.args
    pieces = edges[source]  # type: ignore[index]
    if isinstance(pieces, str):
        raise RewriteError(f"{node.name}: indexing a tensor has no integer form; use chunk or split")
    return str(pieces[index])


def _permutation(node: fx.Node, label: str) -> tuple[int, ...]:
    rank = len(node.meta["shape"])
    if label == "transpose":
        first, second = (_dimension(node, i, key) % rank for i, key in ((1, "dim0"), (2, "dim1")))
        order = list(range(rank))
        order[first], order[second] = order[second], order[first]
        return tuple(order)
    given: Any = node.args[1:] or (node.kwargs["dims"],)
    dims = given[0] if isinstance(given[0], (tuple, list)) else given
    return tuple(int(d) % rank for d in dims)


def _dimension(node: fx.Node, position: int, key: str) -> int:
    return int(node.args[position] if len(node.args) > position else node.kwargs.get(key, 0))  # type: ignore[arg-type]


def _arguments(node: fx.Node) -> dict[str, object]:
    """Return the parameters of a functional form by the names its module has."""
    positions = {"leaky_relu": ("negative_slope",), "elu": ("alpha",), "softplus": ("beta", "threshold")}
    target: Any = node.target
    positional = dict(zip(positions.get(FUNCTION_NAMES[target], ()), node.args[1:], strict=False))
    return {**positional, **{key: value for key, value in node.kwargs.items() if key not in ("input", "inplace")}}
