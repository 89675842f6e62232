"""Write the elementwise functions that stay in floating point as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from export.checks import ExportError
from export.graph import GraphBuilder
from quantizers.integer import Function

Attributes = Mapping[str, object]
# (graph, input tensor, attributes by PyTorch's names, name of the layer) -> output tensor
Writer = Callable[[GraphBuilder, str, Attributes, str], str]


def write_function(graph: GraphBuilder, node: Function, x: str) -> str:
    """Add the nodes of a function of tensor ``x``; return the output tensor.

    Raises:
        ExportError: If the function is not known, or one of its settings has no ONNX form.
    """
    if node.op not in WRITERS:
        raise ExportError(f"{node.name}: no ONNX form is known for {node.op!r}; known are {', '.join(sorted(WRITERS))}")
    return WRITERS[node.op](graph, x, node.attributes, node.name)


def _number(attributes: Attributes, key: str, default: float, layer: str) -> float:
    value = attributes.get(key, default)
    if not isinstance(value, (int, float)):
        raise ExportError(f"{layer}: {key} must be a number, got {value!r}")
    return float(value)


def _plain(operator: str) -> Writer:
    def write(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
        return graph.add(operator, [x], f"{name}.real", name=name)

    return write


def _with(operator: str, theirs: Mapping[str, tuple[str, float]], **fixed: float) -> Writer:
    """``theirs``: ONNX attribute -> (PyTorch's name, PyTorch's default); ``fixed``: ONNX attributes as they are."""

    def write(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
        values = {key: _number(attributes, source, default, name) for key, (source, default) in theirs.items()}
        return graph.add(operator, [x], f"{name}.real", name=name, **values, **fixed)

    return write


def _along_axis(operator: str) -> Writer:
    def write(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
        axis = int(_number(attributes, "axis", _number(attributes, "dim", -1, name), name))
        return graph.add(operator, [x], f"{name}.real", name=name, axis=axis)

    return write


def _clip(low_key: str, low: float, high_key: str, high: float) -> Writer:
    def write(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
        limits = (_number(attributes, low_key, low, name), _number(attributes, high_key, high, name))
        return _write_clip(graph, x, limits, name)

    return write


def _write_clip(graph: GraphBuilder, x: str, limits: tuple[float, float], name: str) -> str:
    low, high = (
        graph.constant(f"{name}.{end}", np.float32(limit)) for end, limit in zip(("low", "high"), limits, strict=True)
    )
    return graph.add("Clip", [x, low, high], f"{name}.real", name=name)


def _relu6(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    return _write_clip(graph, x, (0.0, 6.0), name)


def _silu(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    gate = graph.add("Sigmoid", [x], f"{name}.gate", name=f"{name}.gate")
    return graph.add("Mul", [x, gate], f"{name}.real", name=name)


def _mish(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    soft = graph.add("Softplus", [x], f"{name}.softplus", name=f"{name}.softplus")
    gate = graph.add("Tanh", [soft], f"{name}.gate", name=f"{name}.gate")
    return graph.add("Mul", [x, gate], f"{name}.real", name=name)


def _gelu(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    """0.5 x (1 + erf(x / sqrt 2)), spelled out: the Gelu operator is younger (opset 20) than int8 files need."""
    if attributes.get("approximate", "none") != "none":
        raise ExportError(f"{name}: gelu has an ONNX form with approximate='none' only")

    def constant(key: str, value: float) -> str:
        return graph.constant(f"{name}.{key}", np.float32(value))

    scaled = graph.add("Div", [x, constant("sqrt2", 2**0.5)], f"{name}.scaled", name=f"{name}.div")
    erf = graph.add("Erf", [scaled], f"{name}.erf", name=f"{name}.erf")
    gate = graph.add("Add", [erf, constant("one", 1.0)], f"{name}.gate", name=f"{name}.add")
    product = graph.add("Mul", [x, gate], f"{name}.product", name=f"{name}.mul")
    return graph.add("Mul", [product, constant("half", 0.5)], f"{name}.real", name=name)


WRITERS: dict[str, Writer] = {
    "clamp": _clip("min", -np.inf, "max", np.inf),
    "elu": _with("Elu", {"alpha": ("alpha", 1.0)}),
    "gelu": _gelu,
    # PyTorch's hardsigmoid is clip(x / 6 + 1 / 2); ONNX's own default slope is 0.2
    "hardsigmoid": _with("HardSigmoid", {}, alpha=1 / 6, beta=0.5),
    "hardswish": _plain("HardSwish"),
    "hardtanh": _clip("min_val", -1.0, "max_val", 1.0),
    "leaky_relu": _with("LeakyRelu", {"alpha": ("negative_slope", 0.01)}),
    "log_softmax": _along_axis("LogSoftmax"),
    "mish": _mish,
    "relu": _plain("Relu"),
    "relu6": _relu6,
    "selu": _plain("Selu"),
    "sigmoid": _plain("Sigmoid"),
    "silu": _silu,
    "softmax": _along_axis("Softmax"),
    "softsign": _plain("Softsign"),
    "tanh": _plain("Tanh"),
}
