"""Spells sums, differences, products and quotients, with constants as factors and offsets per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quantizers.graph.form.canonical import Affine, Expand, Move, Permute, Reshape
from quantizers.graph.form.refusal import NoSpelling
from quantizers.graph.spelling.call import Call
from quantizers.graph.spelling.moves import apply, volume
from quantizers.graph.spelling.pen import Pen, Value
from quantizers.layers import Product, Sum

Operand = Value | Tensor | float | int


def add(pen: Pen, call: Call) -> Value:
    """Spell ``self + alpha * other``."""
    return combine(pen, call["self"], 1.0, call["other"], call.get("alpha", 1))


def sub(pen: Pen, call: Call) -> Value:
    """Spell ``self - alpha * other``."""
    return combine(pen, call["self"], 1.0, call["other"], -call.get("alpha", 1))


def rsub(pen: Pen, call: Call) -> Value:
    """Spell ``other - alpha * self``."""
    return combine(pen, call["self"], -call.get("alpha", 1), call["other"], 1.0)


def neg(pen: Pen, call: Call) -> Value:
    """Spell a negation."""
    return affine(pen, call.value(), -1.0, 0.0)


def mul(pen: Pen, call: Call) -> Value:
    """Spell a product."""
    return multiply(pen, call["self"], call["other"])


def div(pen: Pen, call: Call) -> Value:
    """Spell a quotient by a constant."""
    divisor = call["other"]
    if call.get("rounding_mode") is not None or not isinstance(call["self"], Value) or isinstance(divisor, Value):
        raise NoSpelling
    return multiply(pen, call["self"], _reciprocal(pen, divisor))


def square(pen: Pen, call: Call) -> Value:
    """Spell a square."""
    return multiply(pen, call.value(), call.value())


def power(pen: Pen, call: Call) -> Value:
    """Spell a small integer power as products."""
    exponent = call["exponent"]
    if not isinstance(call["self"], Value) or isinstance(exponent, (Value, Tensor)) or exponent not in (1, 2, 3):
        raise NoSpelling
    value = call.value()
    for _ in range(int(exponent) - 1):
        value = multiply(pen, value, call.value())
    return value


def addcmul(pen: Pen, call: Call) -> Value:
    """Spell ``self + value * tensor1 * tensor2``."""
    product = _product(pen, call["tensor1"], call["tensor2"])
    return combine(pen, call["self"], 1.0, product, call["value"])


def lerp(pen: Pen, call: Call) -> Value:
    """Spell ``self + weight * (end - self)``."""
    weight = call["weight"]
    if isinstance(weight, Value):
        difference = combine(pen, call["end"], 1.0, call["self"], -1.0, aside=True)
        return combine(pen, call["self"], 1.0, multiply(pen, difference, weight, aside=True), 1.0)
    rest = pen.constant_like(weight, 1 - weight) if isinstance(weight, Tensor) else 1 - weight
    first = _product(pen, call["self"], rest)
    return combine(pen, first, 1.0, _product(pen, call["end"], weight), 1.0)


def _product(pen: Pen, a: Any, b: Any) -> Any:
    if isinstance(a, Value) or isinstance(b, Value):
        return multiply(pen, a, b, aside=True)
    result = a * b
    pen.derive([part for part in (a, b) if isinstance(part, Tensor)], result)
    return result


def _reciprocal(pen: Pen, divisor: Any) -> Any:
    if not isinstance(divisor, Tensor):
        return 1.0 / divisor
    return pen.constant_like(divisor, divisor.reciprocal())


def multiply(pen: Pen, a: Operand, b: Operand, *, aside: bool = False) -> Value:
    """Write a product of two operands, one of which depends on the images."""
    if isinstance(a, Value) and isinstance(b, Value):
        return pen.emit(Product(), a, b, aside=aside)
    value, constant = (a, b) if isinstance(a, Value) else (b, a)
    return affine(pen, value, constant, 0.0, aside=aside)  # type: ignore[arg-type]


def combine(pen: Pen, a: Operand, alpha: float, b: Operand, beta: float, *, aside: bool = False) -> Value:
    """Write ``alpha * a + beta * b``."""
    if isinstance(a, Value) and isinstance(b, Value):
        return pen.emit(Sum(), scaled(pen, a, alpha), scaled(pen, b, beta), aside=aside)
    if isinstance(a, Value):
        return affine(pen, a, alpha, b if beta == 1 else _scaled_constant(pen, b, beta), aside=aside)
    return affine(pen, b, beta, a if alpha == 1 else _scaled_constant(pen, a, alpha), aside=aside)  # type: ignore[arg-type]


def _scaled_constant(pen: Pen, constant: Any, factor: float) -> Any:
    return pen.constant_like(constant, constant * factor) if isinstance(constant, Tensor) else constant * factor


def scaled(pen: Pen, value: Value, factor: float) -> Value:
    """Return ``value`` times a number, as a helper step of the operation that needs it."""
    return value if factor == 1 else affine(pen, value, factor, 0.0, aside=True)


# -- constants: which axes they vary along -----------------------------------------------------------------------------


def affine(pen: Pen, value: Value, scale: Any, shift: Any, *, aside: bool = False) -> Value:
    """Write ``value * scale + shift``; scale and shift are numbers or tensors that broadcast with ``value``.

    Raises:
        NoSpelling: If a constant differs from image to image, or is random.
    """
    if not value.tensor.is_floating_point():
        raise NoSpelling("it computes with values that are not floating-point; use float tensors")
    learned = (_is_learned(pen, scale), _is_learned(pen, shift))
    value, factors, offsets = _aligned(pen, value, scale, shift)
    rank = len(value.shape)
    factors = _shrunk(factors) if not learned[0] else factors
    offsets = _shrunk(offsets) if not learned[1] else offsets
    varying = [axis for axis in range(1, rank) if factors.shape[axis] > 1 or offsets.shape[axis] > 1]
    if varying not in ([], [1]):
        return _grouped(pen, value, (factors, offsets), varying, (scale, shift), learned, aside=aside)
    module = _map(pen, factors.reshape(-1), offsets.reshape(-1), (scale, shift), learned)
    if rank == 1:
        column = pen.emit(module, pen.emit(Reshape((1,)), value, aside=True), aside=True)
        return pen.emit(Reshape(()), column, aside=aside)
    return pen.emit(module, value, aside=aside)


def _map(
    pen: Pen, factors: Tensor, offsets: Tensor, given: tuple[Any, Any], learned: tuple[bool, bool]
) -> Affine:  # fmt: skip
    """Return an affine map, with its learned parts noted as the network's ``given`` ones."""
    module = Affine(factors, offsets, learned=learned)
    for part, tensor, trains in zip((module.scale, module.shift), given, learned, strict=True):
        if trains:
            pen.note_origin(part, tensor)
    return module


def _is_learned(pen: Pen, constant: Any) -> bool:
    if not isinstance(constant, Tensor):
        return False
    return pen.require_steady(constant).learned


def _aligned(pen: Pen, value: Value, scale: Any, shift: Any) -> tuple[Value, Tensor, Tensor]:
    """Return the value, expanded where constants are larger, and constants of its rank with a batch of one."""
    like = value.tensor
    constants = [
        c.detach().to(like.dtype) if isinstance(c, Tensor) else torch.tensor(float(c)).to(like) for c in (scale, shift)
    ]
    shape = torch.broadcast_shapes(like.shape, *(c.shape for c in constants))  # type: ignore[no-untyped-call]
    if tuple(shape) != value.shape:
        if len(shape) != len(value.shape) or shape[0] != value.shape[0]:
            raise NoSpelling(
                "a constant has more axes than the other operand; give the images' tensor those axes first"
            )
        value = pen.emit(Expand(shape[1:]), value, aside=True)
    full = [c.reshape((1,) * (len(shape) - c.dim()) + tuple(c.shape)) for c in constants]
    return value, *(_one_row(c) for c in full)  # type: ignore[return-value]


def _one_row(constant: Tensor) -> Tensor:
    if constant.dim() and constant.shape[0] > 1:
        if not bool((constant == constant[:1]).all()):
            raise NoSpelling("it computes with a constant for each image of the batch; use one for all images")
        return constant[:1]
    return constant


def _shrunk(constant: Tensor) -> Tensor:
    """Return a constant without the axes along which it is uniform."""
    for axis in range(constant.dim()):
        first = constant.narrow(axis, 0, 1)
        if constant.shape[axis] > 1 and bool((constant == first).all()):
            constant = first
    return constant


def _grouped(
    pen: Pen, value: Value, parts: tuple[Tensor, Tensor], varying: Sequence[int], given: tuple[Any, Any],
    learned: tuple[bool, bool], *, aside: bool,
) -> Value:  # fmt: skip
    """Write an affine map whose constants vary along other axes: those axes become the channels, and back."""
    rank, shape = len(value.shape), value.shape
    rest = [axis for axis in range(1, rank) if axis not in varying]
    order = [0, *varying, *rest]
    sizes = [shape[axis] for axis in varying]
    moved = tuple(shape[axis] for axis in order)
    there: list[Move] = [] if order == sorted(order) else [Permute(order)]
    there.append(Reshape((volume(sizes), volume([shape[axis] for axis in rest]))))
    back: list[Move] = [Reshape(moved[1:])]
    if order != sorted(order):
        back.append(Permute([order.index(axis) for axis in range(rank)]))
    constants = [
        c.permute(order).expand(1, *sizes, *(1 for _ in rest)).reshape(-1) if c.numel() > 1 else c.reshape(-1)
        for c in parts
    ]
    value = apply(pen, value, there, aside=True)
    value = pen.emit(_map(pen, constants[0], constants[1], given, learned), value, aside=True)
    return apply(pen, value, back, aside=aside)
