"""Spells operations with weights: convolutions of every kind, linear layers, batch norm, PReLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.graph.form.canonical import Affine, Pad, Permute, Reshape, Slice
from quantizers.graph.form.refusal import NoSpelling
from quantizers.graph.spelling.call import Call, pair
from quantizers.graph.spelling.moves import volume
from quantizers.graph.spelling.pen import Pen, Value

Pair = tuple[int, int]


def convolution(pen: Pen, call: Call) -> Value:
    """Spell a convolution of images or sequences (as images of one row), or a transposed one of images."""
    value, weight, bias = _operands(call, "input")
    if weight.dim() not in (3, 4) or len(value.shape) != weight.dim():
        raise NoSpelling(f"a convolution over {weight.dim() - 2} dimensions has no low-bit kernel; use Conv2d")
    pen.claim(weight)
    options = {name: tuple(call[name]) for name in ("stride", "padding", "dilation", "output_padding")}
    if weight.dim() == 3:
        return _over_sequences(pen, call, value, weight, bias, options)
    if call["transposed"]:
        return transposed(pen, value, weight, bias, int(call["groups"]), options)
    return _conv(pen, value, weight, bias, int(call["groups"]), options)


def padded_convolution(pen: Pen, call: Call) -> Value:
    """Spell ``conv2d(padding="same")``, which pads unevenly for even windows."""
    value, weight, bias = _operands(call, "input")
    pen.claim(weight)
    options = {name: pair(call[name]) for name in ("stride", "dilation")}
    return _conv(pen, value, weight, bias, int(call["groups"]), {**options, "padding": call["padding"]})


def _operands(call: Call, name: str) -> tuple[Value, Tensor, Tensor | None]:
    weight, bias = call.fixed("weight"), call.fixed("bias")
    if weight is None:
        raise NoSpelling
    return call.value(name), weight, bias


def _conv(
    pen: Pen, value: Value, weight: Tensor, bias: Tensor | None, groups: int, options: dict[str, Any]
) -> Value:  # fmt: skip
    return pen.emit(_module(pen, weight, bias, groups, options), value)


def _module(pen: Pen, weight: Tensor, bias: Tensor | None, groups: int, options: dict[str, Any]) -> nn.Conv2d:
    conv = nn.Conv2d(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), options["stride"], options["padding"],  # type: ignore[arg-type]
        options["dilation"], groups, bias=bias is not None, device="meta",
    )  # fmt: skip
    pen.weigh(conv, weight)
    if bias is not None:
        conv.bias = pen.parameter(bias)
    return conv


def _over_sequences(
    pen: Pen, call: Call, value: Value, weight: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> Value:  # fmt: skip
    rows = {name: (0 if "padding" in name else 1, *given) for name, given in options.items()}
    wide = pen.moved(weight, lambda values: values.unsqueeze(2))
    image = pen.emit(Reshape((value.shape[1], 1, value.shape[2])), value, aside=True)
    groups = int(call["groups"])
    spelled = transposed if call["transposed"] else _conv
    result = spelled(pen, image, wide, bias, groups, rows)
    return pen.emit(Reshape((result.shape[1], result.shape[3])), result, aside=True)


def transposed(
    pen: Pen, value: Value, weight: Tensor, bias: Tensor | None, groups: int, options: dict[str, Any]
) -> Value:  # fmt: skip
    """Write a transposed convolution: zeros between the values, then a convolution with flipped weights.

    Output ``o`` of a transposed convolution sums the inputs ``i`` with ``o = i * stride - padding + k * dilation``:
    a plain convolution, of stride 1, of the inputs ``stride`` apart, padded by ``dilation * (kernel - 1) - padding``.
    """
    kernel, stride = tuple(weight.shape[2:]), options["stride"]
    reach = [dilation * (size - 1) for dilation, size in zip(options["dilation"], kernel, strict=True)]
    before = [r - p for r, p in zip(reach, options["padding"], strict=True)]
    after = [b + extra for b, extra in zip(before, options["output_padding"], strict=True)]
    value = _spread(pen, value, stride)
    # Every spread row ends in stride - 1 zeros, which are part of the padding after it.
    value, padding = _framed(pen, value, before, [a - (s - 1) for a, s in zip(after, stride, strict=True)])
    turned = pen.moved(weight, lambda values: _turned(values, groups))
    plain = {"stride": (1, 1), "padding": padding, "dilation": options["dilation"]}
    return _conv(pen, value, turned, bias, groups, plain)


def _spread(pen: Pen, value: Value, stride: Sequence[int]) -> Value:
    """Insert ``stride - 1`` zeros after every value of each row and column."""
    if tuple(stride) == (1, 1):
        return value
    _, channels, height, width = value.shape
    value = pen.emit(Reshape((channels, height, 1, width, 1)), value, aside=True)
    after = (0, 0, 0, stride[0] - 1, 0, stride[1] - 1)
    value = pen.emit(Pad((0,) * 6, after), value, aside=True)
    return pen.emit(Reshape((channels, height * stride[0], width * stride[1])), value, aside=True)


def _framed(pen: Pen, value: Value, before: Sequence[int], after: Sequence[int]) -> tuple[Value, Pair]:
    """Pad or crop height and width; return the even padding that is left to the convolution."""
    for axis, (front, back) in enumerate(zip(before, after, strict=True), start=2):
        start, end = max(-front, 0), value.shape[axis] - max(-back, 0)
        if (start, end) != (0, value.shape[axis]):
            value = pen.emit(Slice(axis, start, end), value, aside=True)
    even = tuple(max(min(front, back), 0) for front, back in zip(before, after, strict=True))
    sizes = [(0, 0, *(max(amount, 0) - e for amount, e in zip(side, even, strict=True))) for side in (before, after)]
    if any(any(side) for side in sizes):
        value = pen.emit(Pad(*sizes), value, aside=True)
    return value, even  # type: ignore[return-value]


def _turned(weight: Tensor, groups: int) -> Tensor:
    """Return weights ``[in, out / groups, height, width]`` as ``[out, in / groups, height, width]``, flipped."""
    inner, outer = weight.shape[0] // groups, weight.shape[1]
    parts = weight.detach().reshape(groups, inner, outer, *weight.shape[2:]).transpose(1, 2)
    return parts.reshape(groups * outer, inner, *weight.shape[2:]).flip(2, 3).contiguous()


def linear(pen: Pen, call: Call) -> Value:
    """Spell a fully connected layer on the last axis."""
    value, weight, bias = _operands(call, "input")
    return _linear(pen, value, weight, bias)


def _linear(pen: Pen, value: Value, weight: Tensor, bias: Tensor | None) -> Value:
    if len(value.shape) < 2 or weight.dim() != 2:
        raise NoSpelling("a linear layer works on [batch, ..., features]")
    pen.claim(weight)
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    pen.weigh(module, weight)
    if bias is not None:
        module.bias = pen.parameter(bias)
    return pen.emit(module, value)


def matmul(pen: Pen, call: Call) -> Value:
    """Spell ``x @ weight``."""
    value, weight = call["input"], call["other"]
    if isinstance(weight, Value) or not isinstance(value, Value) or weight.dim() != 2:
        raise NoSpelling
    return _linear(pen, value, pen.moved(weight, lambda values: values.detach().t().contiguous()), None)


def batch_norm(pen: Pen, call: Call, *, module: nn.Module | None) -> Value:
    """Spell batch norm.

    Args:
        pen: Where to write.
        call: Its arguments, by their names in ``torch.nn.functional.batch_norm``.
        module: The layer that calls it, which has the momentum and counts batches; None for the function.
    """
    value, mean, var = call.value("input"), call.fixed("running_mean"), call.fixed("running_var")
    if mean is None or var is None:
        raise NoSpelling(
            "batch norm without running statistics cannot be folded; set track_running_stats=True", bare=True
        )
    weight, bias = call.fixed("weight"), call.fixed("bias")
    pen.claim(mean)
    flat = len(value.shape) == 2
    norm = (nn.BatchNorm1d if flat else nn.BatchNorm2d)(mean.numel(), eps=call["eps"], device="meta")
    norm.affine = weight is not None or bias is not None
    norm.weight = None if weight is None else pen.parameter(weight)  # type: ignore[assignment]
    norm.bias = None if bias is None else pen.parameter(bias)  # type: ignore[assignment]
    norm.running_mean, norm.running_var = mean.detach().clone(), var.detach().clone()
    norm.num_batches_tracked = torch.tensor(0)
    norm.momentum = call["momentum"]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        norm.momentum = module.momentum
        if module.num_batches_tracked is not None:
            norm.num_batches_tracked = module.num_batches_tracked.detach().clone()
    if len(value.shape) in (2, 4):
        return pen.emit(norm, value)
    shape = value.shape[1:]
    image = pen.emit(Reshape((shape[0], volume(shape[1:]), 1)), value, aside=True)
    return pen.emit(Reshape(shape), pen.emit(norm, image), aside=True)


def fixed_norm(norm: nn.modules.batchnorm._BatchNorm) -> Affine:
    """Return batch norm that always uses its running statistics as a factor and an offset per channel."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("batch norm without running statistics is not an affine map")
    scale = torch.rsqrt(var + norm.eps) * (1 if norm.weight is None else norm.weight.detach())
    shift = -mean * scale + (0 if norm.bias is None else norm.bias.detach())
    trains = [parameter is not None and parameter.requires_grad for parameter in (norm.weight, norm.bias)]
    return Affine(scale, shift, learned=(trains[0], trains[1]))


def prelu(pen: Pen, call: Call) -> Value:
    """Spell PReLU; calls of one module share its slopes."""
    weight = call.fixed("weight")
    if weight is None:
        raise NoSpelling
    module = nn.PReLU(weight.numel(), device="meta")
    module.weight = pen.parameter(weight)
    return pen.emit(module, call.value("input"))


def permuted(pen: Pen, value: Value, order: Sequence[int]) -> Value:
    """Return axes in another order, as a helper step of the operation that needs it."""
    return value if list(order) == sorted(order) else pen.emit(Permute(order), value, aside=True)
