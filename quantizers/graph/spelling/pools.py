"""Spells pooling, and means, sums and maxima that equal a pooling."""

from __future__ import annotations

from typing import Any

from torch import nn

from quantizers.graph.form.canonical import Reshape
from quantizers.graph.form.pooling import even_windows
from quantizers.graph.form.refusal import NoSpelling
from quantizers.graph.spelling.arithmetic import affine
from quantizers.graph.spelling.call import Call, axis_of, pair
from quantizers.graph.spelling.layers import permuted
from quantizers.graph.spelling.moves import BATCH, gather, volume
from quantizers.graph.spelling.pen import Pen, Value
from quantizers.layers import GlobalAveragePool, Sum


def _pooled(pen: Pen, value: Value, module: nn.Module) -> Value:
    """Write a pooling of two axes; torch takes axis 0 of three for channels, so use images of one channel there."""
    if len(value.shape) == 4:
        return pen.emit(module, value)
    result = pen.emit(module, pen.emit(Reshape((1, *value.shape[1:])), value, aside=True))
    return pen.emit(Reshape(result.shape[2:]), result, aside=True)


def _window(call: Call, name: str, default: Any) -> tuple[int, int]:
    given = call.get(name)
    return pair(default if given is None or given == [] else given)


def max_pool(pen: Pen, call: Call) -> Value:
    """Spell max pooling; torch itself treats sequences as images of one row."""
    value, kernel = call.value(), call["kernel_size"]
    module = nn.MaxPool2d(
        _window(call, "kernel_size", kernel), _window(call, "stride", kernel), _window(call, "padding", 0),
        _window(call, "dilation", 1),
        ceil_mode=bool(call.get("ceil_mode", False)),
    )  # fmt: skip
    return _pooled(pen, value, module)


def avg_pool(pen: Pen, call: Call) -> Value:
    """Spell average pooling; torch itself treats sequences as images of one row."""
    value, kernel, divisor = call.value(), call["kernel_size"], call.get("divisor_override")
    if divisor and call.get("ceil_mode", False):
        raise NoSpelling("ceil_mode with another divisor has no integer kernel; use plain pooling", bare=True)
    module = nn.AvgPool2d(
        _window(call, "kernel_size", kernel), _window(call, "stride", kernel), _window(call, "padding", 0),
        bool(call.get("ceil_mode", False)), bool(call.get("count_include_pad", True)) or bool(divisor),
    )  # fmt: skip
    result = _pooled(pen, value, module)
    return affine(pen, result, volume(_window(call, "kernel_size", kernel)) / divisor, 0.0) if divisor else result


def adaptive_avg_pool(pen: Pen, call: Call) -> Value:
    """Spell adaptive average pooling, with the sizes taken from its result."""
    value = call.value("input")
    if len(value.shape) == 4:
        return pen.emit(nn.AdaptiveAvgPool2d(call.shape[2:]), value)
    if call.name != "adaptive_avg_pool1d":
        return _pooled(pen, value, nn.AdaptiveAvgPool2d(call.shape[1:]))
    row = pen.emit(Reshape((value.shape[1], 1, value.shape[2])), value, aside=True)
    result = pen.emit(nn.AdaptiveAvgPool2d((1, call.shape[2])), row)
    return pen.emit(Reshape(call.shape[1:]), result, aside=True)


def adaptive_max_pool(pen: Pen, call: Call) -> Value:
    """Spell adaptive max pooling; uneven windows get values twice, which preserves their maxima."""
    value = call.value()
    if len(value.shape) != 4:
        raise NoSpelling("adaptive max pooling of sequences has no low-bit form; use max_pool1d")
    kernel = []
    for axis in (2, 3):
        indices, length = even_windows(value.shape[axis], call.shape[axis])
        kernel.append(length)
        if indices != list(range(value.shape[axis])):
            value = gather(pen, value, axis, indices)
    return pen.emit(nn.MaxPool2d(tuple(kernel), tuple(kernel)), value)


# -- reductions --------------------------------------------------------------------------------------------------------


def mean(pen: Pen, call: Call) -> Value:
    """Spell a mean."""
    return _reduced(pen, call, "mean")


def total(pen: Pen, call: Call) -> Value:
    """Spell a sum over axes: a mean, times the number of values."""
    value = call.value()
    if value.node in pen.stacks and _axes(call, value) == [pen.module_of(value).axis]:  # type: ignore[union-attr]
        return _stacked(pen, call, value, 1.0)
    count = volume([value.shape[axis] for axis in _axes(call, value)])
    return affine(pen, _reduced(pen, call, "mean", aside=True), float(count), 0.0)


def largest(pen: Pen, call: Call) -> Value:
    """Spell a maximum over axes."""
    return _reduced(pen, call, "max")


def _axes(call: Call, value: Value) -> list[int]:
    rank, given = len(value.shape), call.get("dim")
    given = range(rank) if given is None or given == [] else given
    given = [given] if isinstance(given, int) else given
    return sorted(axis_of(axis, rank) for axis in given)


def _reduced(pen: Pen, call: Call, kind: str, *, aside: bool = False) -> Value:
    value = call.value()
    axes, rank = _axes(call, value), len(value.shape)
    if value.node in pen.stacks and kind == "mean" and axes == [pen.module_of(value).axis]:  # type: ignore[union-attr]
        return _stacked(pen, call, value, 1.0 / len(pen.stacks[value.node]))
    if 0 in axes:
        raise NoSpelling(BATCH)
    if rank == 4 and axes == [2, 3] and kind == "mean":
        return pen.emit(GlobalAveragePool(keepdims=len(call.shape) == 4), value, aside=aside)
    kept = [axis for axis in range(1, rank) if axis not in axes]
    if rank != 4 or axes not in ([2], [3], [2, 3]):
        value = permuted(pen, value, [0, *kept, *axes])
        outer, inner = ([value.shape[1 + i] for i in span] for span in (range(len(kept)), range(len(kept), rank - 1)))
        value = pen.emit(Reshape((volume(outer), volume(inner), 1)), value, aside=True)
        axes = [2, 3]
    kernel = (value.shape[2] if 2 in axes else 1, value.shape[3] if 3 in axes else 1)
    pool: nn.Module = nn.AvgPool2d(kernel, kernel) if kind == "mean" else nn.MaxPool2d(kernel, kernel)
    value = pen.emit(pool, value, aside=aside)
    return value if value.shape == call.shape else pen.emit(Reshape(call.shape[1:]), value, aside=True)


def _stacked(pen: Pen, call: Call, value: Value, factor: float) -> Value:
    """Write a sum over the axis of a stack as sums of the stacked tensors."""
    first, *others = pen.stacks[value.node]
    for number, other in enumerate(others, start=1):
        is_last = number == len(others) and factor == 1
        first = pen.emit(Sum(), first, other, aside=not is_last)
    if factor != 1:
        first = affine(pen, first, factor, 0.0)
    return first if first.shape == call.shape else pen.emit(Reshape(call.shape[1:]), first, aside=True)
