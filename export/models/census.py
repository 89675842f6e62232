"""Count a graph's operators before and after ONNX Runtime's optimization, and report which layers stayed in float."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from export.passes.rewrite import consumers
from export.runtime import open_session
from export.scratch import scratch_folder
from quantizers import integer as ir

# Operators that compute on integers; any other with a layer's name after optimization is a float kernel.
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
KEEPS_CODES = (
    ir.MaxPool,
    ir.Concat,
)  # written on uint8 codes: integer under their own names where their edge is on a grid
FUSED_FUNCTIONS = ("relu", "relu6")  # part of the float kernel before them, which is named itself
FINAL_FUNCTIONS = ("softmax", "log_softmax")
COUNTED = (ir.Conv, ir.Linear, ir.Add, ir.Mul, ir.AveragePool, ir.GlobalAveragePool)


@dataclass(frozen=True)
class Census:
    """What the runtime runs.

    Args:
        operators: Operator -> how often it occurs after optimization.
        kernels: Name of a layer's ONNX node -> operator that computes it after optimization.
        fall_backs: A sentence for each layer and each function that stayed in float, with its name and why.
    """

    operators: Mapping[str, int]
    kernels: Mapping[str, str]
    fall_backs: tuple[str, ...]


def count_operators(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator occurs, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def take_census(
    model: bytes, view: ir.IntegerView, places: Mapping[str, ir.Node], input_shapes: Sequence[tuple[int, ...]]
) -> Census:
    """Load a model in ONNX Runtime, run it once, read back its optimized graph, and look every layer up in it.

    Args:
        model: The serialized model.
        view: The view it was lowered from (``Lowered.view``).
        places: Name of the ONNX node -> node of that view (``Lowered.places``).
        input_shapes: A shape for each input. Loading alone does not detect every mismatch of shapes.

    Raises:
        ImportError: If onnxruntime is missing.
    """
    optimized = optimized_graph(model, input_shapes)
    kernels = _kernels(optimized, places)
    return Census(count_operators(optimized), kernels, tuple(_fall_backs(kernels, view, places)))


def float_inputs(view: ir.IntegerView, places: Mapping[str, ir.Node], steps: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence for each layer, sum, product, mean or function that reads values without a grid, with its name.

    For graphs that no installed runtime loads: any runtime must compute such a node in float, as its inputs, or the
    values between the operators that spell a function out, are real.

    Args:
        view: The view the graph was lowered from (``Lowered.view``).
        places: Name of the ONNX node -> node of that view (``Lowered.places``).
        steps: Name of the ONNX node -> how many operators its node of the view was written with (``Lowered.steps``).
    """
    for name, node in places.items():
        real = [edge for edge in node.inputs if edge not in view.grids]
        if is_final(node, view):
            continue
        if isinstance(node, (*COUNTED, *KEEPS_CODES, ir.Function)) and real:
            yield f"{name} ({_kind(node)}) computes in float: an input is not quantized ({', '.join(real)})"
        elif isinstance(node, ir.Function) and steps.get(name, 1) > 1:
            yield f"{name} ({_kind(node)}) computes in float: it takes {steps[name]} operators, no grid between them"


def is_final(node: ir.Node, view: ir.IntegerView) -> bool:
    """Return whether a node is the softmax of the model's own output, which is real-valued by its nature."""
    return (
        isinstance(node, ir.Function)
        and node.op in FINAL_FUNCTIONS
        and _after_moves(node.output, view)[0] in view.outputs
    )


def _kind(node: ir.Node) -> str:
    return node.op if isinstance(node, ir.Function) else type(node).__name__


def optimized_graph(model: bytes, input_shapes: Sequence[tuple[int, ...]]) -> onnx.ModelProto:
    """Return ONNX Runtime's version of a model with all optimizations on, after a run on zeros of these shapes."""
    with scratch_folder(room=len(model)) as folder:
        path = folder / "optimized.onnx"
        session = open_session(model, optimize=True, optimized_path=path)
        zeros = {
            entry.name: _zeros(entry.type, entry.shape, shape)
            for entry, shape in zip(session.get_inputs(), input_shapes, strict=True)
        }
        session.run(None, zeros)
        return onnx.load(path)


def _zeros(kind: str, declared: Sequence[int | str], shape: Sequence[int]) -> npt.NDArray[Any]:
    if kind == "tensor(uint8)":  # pixels, whose axes may be in another order
        return np.zeros((1, *(size for size in declared[1:] if isinstance(size, int))), np.uint8)
    return np.zeros((1, *shape[1:]), np.float32)


def _kernels(optimized: onnx.ModelProto, places: Mapping[str, ir.Node]) -> dict[str, str]:
    """Look every layer up by name: fused nodes keep the layer's, with ``_token_7`` or ``/Fusion/`` appended."""
    operators: dict[str, str] = {}
    for node in optimized.graph.node:
        operators[re.sub(r"(_token_\d+)+$", "", node.name).split("/")[0] if node.name else ""] = node.op_type
    return {name: operators.get(name, "") for name in places}


def _fall_backs(kernels: Mapping[str, str], view: ir.IntegerView, places: Mapping[str, ir.Node]) -> Iterator[str]:
    for name, kernel in kernels.items():
        node = places[name]
        on_codes = isinstance(node, KEEPS_CODES) and node.output in view.grids
        is_judged = isinstance(node, (*COUNTED, *KEEPS_CODES, ir.Function)) and not is_final(node, view)
        is_fused = not kernel and isinstance(node, ir.Function) and node.op in FUSED_FUNCTIONS
        if on_codes or kernel in INTEGER_KERNELS or is_fused or not is_judged:
            continue
        what = f"runs as {kernel} in float" if kernel else "is not found among the integer kernels"
        yield f"{name} ({_kind(node)}) {what}: {_reason(node, view)}"


def _reason(node: ir.Node, view: ir.IntegerView) -> str:
    edge, readers = _after_moves(node.output, view)
    if any(edge not in view.grids for edge in node.inputs):
        return "an input is not quantized"
    if edge in view.outputs:
        return "its output is the model's own, and real-valued"
    others = sorted({reader.name for reader in readers if not isinstance(reader, ir.Quantize)})
    if others:
        return f"its real-valued output is read by {', '.join(others)}"
    if len(readers) > 1:
        return f"its output goes to {len(readers)} grids ({', '.join(reader.name for reader in readers)})"
    return "ONNX Runtime has no integer kernel for it"


def _after_moves(edge: str, view: ir.IntegerView) -> tuple[str, list[ir.Node]]:
    """Return the edge that a real-valued one becomes by operations that only move values, and its readers."""
    readers = consumers(view)
    while len(found := readers.get(edge, [])) == 1 and isinstance(found[0], ir.Shape):
        edge = found[0].output
    return edge, found
