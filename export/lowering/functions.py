"""Write the functions that stay in floating point as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from export.checks import ExportError
from export.graph.builder import GraphBuilder
from quantizers.integer import Function

SOFTPLUS_IS_IDENTITY = 17.0  # log(1 + exp(x)) - x is less than half a step of float32 from here on

Attributes = Mapping[str, object]
# (graph, input tensor, attributes by PyTorch's names, name of the layer) -> output tensor
Writer = Callable[[GraphBuilder, str, Attributes, str], str]


def write_function(graph: GraphBuilder, node: Function, x: str) -> str:
    """Add the nodes of a function to a graph.

    Args:
        graph: The graph to add to.
        node: The function, with its settings.
        x: Name of the input tensor, float32.

    Returns:
        Name of the output tensor, float32, of the input's shape.

    Raises:
        ExportError: If the function is not known, or one of its settings has no ONNX form.
    """
    if node.op not in FUNCTION_WRITERS:
        known = ", ".join(sorted(FUNCTION_WRITERS))
        raise ExportError(f"{node.name}: no ONNX form is known for {node.op!r}; known are {known}")
    return FUNCTION_WRITERS[node.op](graph, x, node.attributes, node.name)


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
    """``theirs``: ONNX attribute -> (PyTorch's name, PyTorch's default); ``fixed``: ONNX attributes, unchanged."""

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


class _Steps:
    """The steps of one function, the last under the layer's own name."""

    def __init__(self, graph: GraphBuilder, name: str) -> None:
        self.graph, self.name = graph, name

    def number(self, key: str, value: float) -> str:
        return self.graph.constant(f"{self.name}.{key}", np.float32(value))

    def do(self, operator: str, key: str, *inputs: str, **attributes: float) -> str:
        return self.graph.add(operator, inputs, f"{self.name}.{key}", name=f"{self.name}.{key}", **attributes)

    def last(self, operator: str, *inputs: str, **attributes: float) -> str:
        return self.graph.add(operator, inputs, f"{self.name}.real", name=self.name, **attributes)


def _gelu(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    """``x / 2 * (1 + f(x))``, spelled out: the Gelu operator is newer (opset 20) than int8 files need."""
    form = attributes.get("approximate", "none")
    if form not in ("none", "tanh"):
        raise ExportError(f"{name}: gelu has an ONNX form with approximate='none' or 'tanh', got {form!r}")
    steps = _Steps(graph, name)
    inner = _gelu_tanh(steps, x) if form == "tanh" else _gelu_erf(steps, x)
    gate = steps.do("Add", "gate", inner, steps.number("one", 1.0))
    return steps.last("Mul", steps.do("Mul", "product", x, gate), steps.number("half", 0.5))


def _gelu_erf(steps: _Steps, x: str) -> str:
    return steps.do("Erf", "erf", steps.do("Div", "scaled", x, steps.number("sqrt2", 2**0.5)))


def _gelu_tanh(steps: _Steps, x: str) -> str:
    """tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)), PyTorch's constants."""
    cube = steps.do("Mul", "cube", steps.do("Mul", "square", x, x), x)
    bent = steps.do("Add", "bent", x, steps.do("Mul", "bend", cube, steps.number("kappa", 0.044715)))
    return steps.do("Tanh", "tanh", steps.do("Mul", "scaled", bent, steps.number("beta", (2 / np.pi) ** 0.5)))


def _softplus(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    """``log(1 + exp(beta x)) / beta``, and ``x`` itself where ``beta x`` is above the threshold."""
    beta, threshold = _number(attributes, "beta", 1.0, name), _number(attributes, "threshold", 20.0, name)
    steps = _Steps(graph, name)
    if beta == 1.0 and threshold >= SOFTPLUS_IS_IDENTITY:
        return steps.last("Softplus", x)
    scaled = steps.do("Mul", "scaled", x, steps.number("beta", beta))
    soft = steps.do("Div", "divided", steps.do("Softplus", "soft", scaled), steps.number("divisor", beta))
    above = steps.do("Greater", "above", scaled, steps.number("threshold", threshold))
    return steps.last("Where", above, x, soft)


def _log_sigmoid(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    steps = _Steps(graph, name)
    return steps.last("Neg", steps.do("Softplus", "soft", steps.do("Neg", "turned", x)))


def _tanhshrink(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    steps = _Steps(graph, name)
    return steps.last("Sub", x, steps.do("Tanh", "tanh", x))


def _threshold(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    steps = _Steps(graph, name)
    limit, value = (steps.number(key, _number(attributes, key, 0.0, name)) for key in ("threshold", "value"))
    return steps.last("Where", steps.do("Greater", "above", x, limit), x, value)


def _shrink(*, is_soft: bool) -> Writer:
    def write(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
        edge = _number(attributes, "lambd", 0.5, name)
        return _Steps(graph, name).last("Shrink", x, lambd=edge, bias=edge if is_soft else 0.0)

    return write


def _prelu(graph: GraphBuilder, x: str, attributes: Attributes, name: str) -> str:
    slope = attributes.get("slope")
    if not isinstance(slope, np.ndarray):
        raise ExportError(f"{name}: slope must be an array [channels, 1, ...], got {slope!r}")
    return _Steps(graph, name).last("PRelu", x, graph.constant(f"{name}.slope", slope.astype(np.float32)))


FUNCTION_WRITERS: dict[str, Writer] = {
    "celu": _with("Celu", {"alpha": ("alpha", 1.0)}),
    "clamp": _clip("min", -np.inf, "max", np.inf),
    "elu": _with("Elu", {"alpha": ("alpha", 1.0)}),
    "gelu": _gelu,
    "hardshrink": _shrink(is_soft=False),
    # PyTorch's hardsigmoid is clip(x / 6 + 1 / 2); ONNX's own default slope is 0.2
    "hardsigmoid": _with("HardSigmoid", {}, alpha=1 / 6, beta=0.5),
    "hardswish": _plain("HardSwish"),
    "hardtanh": _clip("min_val", -1.0, "max_val", 1.0),
    "leaky_relu": _with("LeakyRelu", {"alpha": ("negative_slope", 0.01)}),
    "log_sigmoid": _log_sigmoid,
    "log_softmax": _along_axis("LogSoftmax"),
    "mish": _mish,
    "prelu": _prelu,
    "relu": _plain("Relu"),
    "relu6": _relu6,
    "selu": _plain("Selu"),
    "sigmoid": _plain("Sigmoid"),
    "silu": _silu,
    "softmax": _along_axis("Softmax"),
    "softplus": _softplus,
    "softshrink": _shrink(is_soft=True),
    "softsign": _plain("Softsign"),
    "tanh": _plain("Tanh"),
    "tanhshrink": _tanhshrink,
    "threshold": _threshold,
}
