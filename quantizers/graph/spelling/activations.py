"""Spells elementwise activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.graph.form.refusal import NoSpelling
from quantizers.graph.spelling.call import Call, axis_of
from quantizers.graph.spelling.moves import apply, view_moves
from quantizers.graph.spelling.pen import Pen, Value
from quantizers.layers import Product

SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

PLAIN: dict[str, Callable[[Call], nn.Module]] = {
    "relu": lambda _c: nn.ReLU(), "relu6": lambda _c: nn.ReLU6(), "sigmoid": lambda _c: nn.Sigmoid(),
    "hardsigmoid": lambda _c: nn.Hardsigmoid(), "silu": lambda _c: nn.SiLU(), "hardswish": lambda _c: nn.Hardswish(),
    "tanh": lambda _c: nn.Tanh(), "mish": lambda _c: nn.Mish(), "selu": lambda _c: nn.SELU(),
    "log_sigmoid_forward": lambda _c: nn.LogSigmoid(), "softsign": lambda _c: nn.Softsign(),
    "tanhshrink": lambda _c: nn.Tanhshrink(),
    "gelu": lambda c: nn.GELU(c["approximate"]), "leaky_relu": lambda c: nn.LeakyReLU(c["negative_slope"]),
    "celu": lambda c: nn.CELU(c["alpha"]), "softplus": lambda c: nn.Softplus(c["beta"], c["threshold"]),
    "elu": lambda c: _elu(c["alpha"], c["scale"], c["input_scale"]),
    "hardtanh": lambda c: clamp_module(c["min_val"], c["max_val"]),
    "hardshrink": lambda c: nn.Hardshrink(c["lambd"]), "softshrink": lambda c: nn.Softshrink(c["lambd"]),
    "threshold": lambda c: _threshold(c["threshold"], c["value"]),
    "clamp": lambda c: clamp_module(c["min"], c["max"]), "clamp_min": lambda c: clamp_module(c["min"], None),
    "clamp_max": lambda c: clamp_module(None, c["max"]), "clip": lambda c: clamp_module(c["min"], c["max"]),
}  # fmt: skip


def plain(pen: Pen, call: Call) -> Value:
    """Spell an activation that is one module."""
    operand = call.arguments.get("self", call.arguments.get("input"))
    if not isinstance(operand, Value):
        raise NoSpelling
    for argument in call.arguments.values():
        _require_fixed(pen, argument)
    return pen.emit(PLAIN[call.name](call), operand)


def _require_fixed(pen: Pen, bound: Any) -> None:
    """Raise if a bound is trained: the student would keep its current value."""
    if isinstance(bound, Tensor) and pen.require_steady(bound).learned:
        raise NoSpelling("its bound is learned; use a constant, or freeze it with requires_grad_(False)")


def _number(bound: Any) -> float | None:
    if isinstance(bound, Value):
        raise NoSpelling("its bound is computed from the images; use a constant")
    if isinstance(bound, Tensor):
        if bound.numel() != 1 and not bool((bound == bound.flatten()[0]).all()):
            raise NoSpelling("its bound differs between values; use one number")
        bound = bound.flatten()[0].item()
    return None if bound is None or math.isinf(bound) else float(bound)  # the check catches a wrong infinity


def clamp_module(low: Any, high: Any) -> nn.Module:
    """Return the activation that limits values to [low, high]; None means no limit."""
    least, most = _number(low), _number(high)
    if least == 0 and (most is None or most == 6):
        return nn.ReLU() if most is None else nn.ReLU6()
    limit = float(torch.finfo(torch.float32).max)
    least, most = -limit if least is None else least, limit if most is None else most
    if not least < most:
        raise NoSpelling(f"its bounds leave only one value ({least:g} and {most:g}); use a lower and a higher bound")
    return nn.Hardtanh(least, most)


def _elu(alpha: float, scale: float, input_scale: float) -> nn.Module:
    if math.isclose(alpha, SELU_ALPHA) and math.isclose(scale, SELU_SCALE) and input_scale == 1:
        return nn.SELU()
    if scale == 1 and input_scale == 1:
        return nn.ELU(alpha)
    if scale == 1 and math.isclose(alpha * input_scale, 1):
        return nn.CELU(alpha)
    raise NoSpelling


def _threshold(threshold: float, value: float) -> nn.Module:
    if threshold == value == 0:
        return nn.ReLU()
    return nn.Threshold(threshold, value)


def extremum(pen: Pen, call: Call) -> Value:
    """Spell ``torch.maximum`` and ``torch.minimum`` with a constant."""
    first, second = call["self"], call["other"]
    value, bound = (first, second) if isinstance(first, Value) else (second, first)
    if isinstance(bound, Value):
        raise NoSpelling("a maximum or minimum of two computed tensors has no low-bit form; use a sum")
    _require_fixed(pen, bound)
    low, high = (bound, None) if call.name == "maximum" else (None, bound)
    return pen.emit(clamp_module(low, high), value)


def gated(pen: Pen, call: Call) -> Value:
    """Spell a gated linear unit: one half of the channels times the sigmoid of the other."""
    value = call.value()
    axis = axis_of(call["dim"], len(value.shape))
    halves = Call("chunk", {"dim": axis}, (call.shape, call.shape))
    first, second = (apply(pen, value, moves, aside=True) for moves in view_moves(halves, value.shape))
    return pen.emit(Product(), first, pen.emit(nn.Sigmoid(), second, aside=True))


def softmax(pen: Pen, call: Call) -> Value:
    """Spell a softmax or log softmax; a later pass raises unless it is last."""
    value = call.value()
    axis = axis_of(call["dim"], len(value.shape))
    return pen.emit((nn.LogSoftmax if "log" in call.name else nn.Softmax)(axis), value)
