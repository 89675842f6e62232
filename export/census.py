"""Count a graph's operators before and after ONNX Runtime's optimisation, and tell which layers stayed in float."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from export.rewrite import consumers
from export.runtime import open_session
from quantizers.integer import (
    Add,
    AveragePool,
    Concat,
    Conv,
    Function,
    GlobalAveragePool,
    IntegerView,
    Linear,
    MaxPool,
    Mul,
    Node,
    Quantize,
    Shape,
)

# What computes on integers; whatever else carries a layer's name after optimisation is a float kernel.
INTEGER_KERNELS = frozenset(
    {
        "MatMulNBits",  # at the accuracy level it is written with: int8 products, int32 sums
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "QLinearAdd",
        "QLinearMul",
        "QLinearConcat",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
        "QLinearLeakyRelu",
        "QLinearReduceMean",
        "QLinearSigmoid",
        "QLinearSoftmax",
    }
)
KEEPS_CODES = (MaxPool, Concat)  # written on uint8 codes: integer under their own names where their edge is on a grid
COUNTED = (Conv, Linear, Add, Mul, AveragePool, GlobalAveragePool)


@dataclass(frozen=True)
class Census:
    """What the runtime runs.

    Args:
        operators: Operator -> how often it occurs after optimisation.
        kernels: Name of a layer's ONNX node -> operator that computes it after optimisation.
        fall_backs: A sentence for each layer that stayed in float, with its name and why.
        float_functions: Elementwise functions that run in float, as their place in the view says: name -> count.
    """

    operators: Mapping[str, int]
    kernels: Mapping[str, str]
    fall_backs: tuple[str, ...]
    float_functions: Mapping[str, int]


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator occurs, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def take_census(
    model: bytes, view: IntegerView, places: Mapping[str, Node], input_shapes: Sequence[tuple[int, ...]]
) -> Census:
    """Load a model in ONNX Runtime, run it once, read back its optimised graph, and look every layer up in it.

    Args:
        model: The serialised model.
        view: The view it was lowered from (``Lowered.view``).
        places: Name of the ONNX node -> node of that view (``Lowered.places``).
        input_shapes: A shape for each input. Loading alone does not notice all shapes that do not fit each other.

    Raises:
        ImportError: If onnxruntime is missing.
    """
    optimised = optimised_graph(model, input_shapes)
    kernels = _kernels(optimised, places)
    floating = Counter(
        node.op for name, node in places.items() if isinstance(node, Function) and kernels[name] not in INTEGER_KERNELS
    )
    fall_backs = tuple(_fall_backs(kernels, view, places))
    return Census(count_operators(optimised), kernels, fall_backs, dict(floating.most_common()))


def float_inputs(view: IntegerView, places: Mapping[str, Node]) -> Iterator[str]:
    """Yield a sentence for each layer, sum, product or mean that reads values on no grid, by its name.

    What can be said of a graph that no runtime at hand loads: whoever reads such a node's inputs must compute in float.
    """
    for name, node in places.items():
        real = [edge for edge in node.inputs if edge not in view.grids]
        if isinstance(node, (*COUNTED, *KEEPS_CODES)) and real:
            yield f"{name} ({type(node).__name__}) computes in float: an input is not quantized ({', '.join(real)})"


def optimised_graph(model: bytes, input_shapes: Sequence[tuple[int, ...]]) -> onnx.ModelProto:
    """Return what ONNX Runtime makes of a model with all optimisations on, after a run on zeros of these shapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        session = open_session(model, optimise=True, optimised_path=path)
        names = [entry.name for entry in session.get_inputs()]
        zeros = [np.zeros((1, *shape[1:]), np.float32) for shape in input_shapes]
        session.run(None, dict(zip(names, zeros, strict=True)))
        return onnx.load(path)


def _kernels(optimised: onnx.ModelProto, places: Mapping[str, Node]) -> dict[str, str]:
    """Look every layer up by name: fused nodes keep the layer's, with ``_token_7`` or ``/Fusion/`` behind it."""
    operators: dict[str, str] = {}
    for node in optimised.graph.node:
        operators[re.sub(r"(_token_\d+)+$", "", node.name).split("/")[0] if node.name else ""] = node.op_type
    return {name: operators.get(name, "") for name in places}


def _fall_backs(kernels: Mapping[str, str], view: IntegerView, places: Mapping[str, Node]) -> Iterator[str]:
    for name, kernel in kernels.items():
        node = places[name]
        on_codes = isinstance(node, KEEPS_CODES) and node.output in view.grids
        if on_codes or kernel in INTEGER_KERNELS or not isinstance(node, (*COUNTED, *KEEPS_CODES)):
            continue
        what = f"runs as {kernel} in float" if kernel else "is not found among the integer kernels"
        yield f"{name} ({type(node).__name__}) {what}: {_reason(node, view)}"


def _reason(node: Node, view: IntegerView) -> str:
    edge, readers = _after_moves(node.output, view)
    if any(edge not in view.grids for edge in node.inputs):
        return "an input is not quantized"
    if edge in view.outputs:
        return "its output is the model's own, and real-valued"
    others = sorted({reader.name for reader in readers if not isinstance(reader, Quantize)})
    if others:
        return f"its real-valued output is read by {', '.join(others)}"
    if len(readers) > 1:
        return f"its output goes to {len(readers)} grids ({', '.join(reader.name for reader in readers)})"
    return "ONNX Runtime has no integer kernel for it"


def _after_moves(edge: str, view: IntegerView) -> tuple[str, list[Node]]:
    """Return the edge that a real-valued one becomes by operations that only move values, and its readers."""
    readers = consumers(view)
    while len(found := readers.get(edge, [])) == 1 and isinstance(found[0], Shape):
        edge = found[0].output
    return edge, found
