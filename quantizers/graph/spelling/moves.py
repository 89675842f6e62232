"""Spells operations that move values: views as chains of invertible moves, and all others."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.graph.form.canonical import Expand, Gather, Move, Pad, Permute, Reshape, Slice
from quantizers.graph.form.refusal import NoSpelling
from quantizers.graph.spelling.call import Call, axis_of
from quantizers.graph.spelling.pen import Pen, Value
from quantizers.layers import Concat

BATCH = "it mixes or picks images of the batch, which is axis 0 and can have any size; use only the other axes"
Shape = tuple[int, ...]

# -- views: operation -> the moves from its operand to each of its results ---------------------------------------------


def _reshaped(_call: Call, before: Shape, after: Shape) -> list[Move]:
    if not after or not before or before[0] != after[0]:
        raise NoSpelling(BATCH)
    return [] if before == after else [Reshape(after[1:])]


def _permuted(order: Sequence[int]) -> list[Move]:
    if order[0] != 0:
        raise NoSpelling(BATCH)
    return [] if list(order) == sorted(order) else [Permute(order)]


def _permute(call: Call, before: Shape, _after: Shape) -> list[Move]:
    return _permuted([axis_of(axis, len(before)) for axis in call["dims"]])


def _transpose(call: Call, before: Shape, _after: Shape) -> list[Move]:
    order = list(range(len(before)))
    first, second = (axis_of(call[name], len(before)) for name in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return _permuted(order)


def _sliced(before: Shape, axis: int, start: int, end: int, step: int = 1) -> list[Move]:
    if (start, end, step) == (0, before[axis], 1):
        return []
    if axis == 0:
        raise NoSpelling(BATCH)
    return [Slice(axis, start, max(end, start), step)]


def _slice(call: Call, before: Shape, _after: Shape) -> list[Move]:
    axis = axis_of(call["dim"], len(before))
    start, end, step = slice(call["start"], call["end"], call["step"]).indices(before[axis])
    if axis == 0 and before[0] < (call["end"] or 0) < sys.maxsize:  # all of these images, but not all of a larger batch
        raise NoSpelling(BATCH)
    return _sliced(before, axis, start, end, step)


def _select(call: Call, before: Shape, after: Shape) -> list[Move]:
    axis = axis_of(call["dim"], len(before))
    index = int(call["index"]) % before[axis]
    if axis == 0:
        raise NoSpelling(BATCH)
    return [*_sliced(before, axis, index, index + 1), Reshape(after[1:])]


def _expand(_call: Call, before: Shape, after: Shape) -> list[Move]:
    if before == after:
        return []
    if len(after) != len(before) or after[0] != before[0]:
        raise NoSpelling(BATCH)
    return [Expand(after[1:])]


def _same(_call: Call, _before: Shape, _after: Shape) -> list[Move]:
    return []


VIEWS: dict[str, Callable[[Call, Shape, Shape], list[Move]]] = {
    "view": _reshaped, "_unsafe_view": _reshaped, "reshape": _reshaped, "_reshape_alias": _reshaped,
    "flatten": _reshaped, "unflatten": _reshaped, "squeeze": _reshaped, "unsqueeze": _reshaped,
    "permute": _permute, "transpose": _transpose, "slice": _slice, "select": _select, "expand": _expand,
    "detach": _same, "alias": _same, "lift_fresh": _same, "contiguous": _same, "view_as": _reshaped,
}  # fmt: skip


def piece_moves(call: Call, before: Shape) -> list[list[Move]]:
    """Return the moves to each piece of a split along one axis."""
    axis, start, pieces = axis_of(call["dim"], len(before)), 0, []
    size = call.get("split_size")
    if axis == 0 and isinstance(size, int) and size > before[0]:  # one piece now, but several for a larger batch
        raise NoSpelling(BATCH)
    for after in call.shapes:
        size = after[axis] if len(after) == len(before) else 1
        moves = _sliced(before, axis, start, start + size)
        pieces.append(moves if len(after) == len(before) else [*moves, Reshape(after[1:])])
        start += size
    return pieces


PIECES = ("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split", "unsafe_chunk")


def view_moves(call: Call, before: Shape) -> list[list[Move]]:
    """Return the moves from the operand of a view to each of its results.

    Raises:
        NoSpelling: If it touches the batch, or is not a chain of moves.
    """
    if call.name in PIECES:
        return piece_moves(call, before)
    if call.name not in VIEWS:
        raise NoSpelling
    return [VIEWS[call.name](call, before, call.shape)]


def apply(pen: Pen, value: Value, moves: Sequence[Move], *, aside: bool = False) -> Value:
    """Write a chain of moves."""
    for move in moves:
        value = pen.emit(move, value, aside=aside or move is not moves[-1])
    return value


# -- writing through a view --------------------------------------------------------------------------------------------


def scatter(pen: Pen, whole: Value | Tensor, moves: Sequence[Move], part: Value | Tensor) -> Value:
    """Return ``whole`` with the values that ``moves`` select replaced with ``part``."""
    steps = [whole]
    for move in moves:
        steps.append(_moved(pen, steps[-1], move))
    for before, move in zip(reversed(steps[:-1]), reversed(moves), strict=True):
        part = _undone(pen, before, move, part)
    if not isinstance(part, Value):
        raise NoSpelling("constants overwrite all of it")
    return part


def _moved(pen: Pen, value: Value | Tensor, move: Move) -> Value | Tensor:
    return pen.emit(move, value, aside=True) if isinstance(value, Value) else move(value)


def _undone(pen: Pen, before: Value | Tensor, move: Move, part: Value | Tensor) -> Value | Tensor:
    if isinstance(move, Reshape):
        return _moved(pen, part, Reshape(before.shape[1:]))
    if isinstance(move, Permute):
        return _moved(pen, part, Permute([move.order.index(axis) for axis in range(len(move.order))]))
    if isinstance(move, Slice) and move.step == 1:
        rest = [_moved(pen, before, Slice(move.axis, 0, move.start)),
                _moved(pen, before, Slice(move.axis, move.end, before.shape[move.axis]))]  # fmt: skip
        return join(pen, [rest[0], part, rest[1]], move.axis, aside=True)
    if isinstance(move, Slice):
        size = before.shape[move.axis]
        order = list(range(size))
        order[move.start : move.end : move.step] = range(size, size + part.shape[move.axis])
        return _moved(pen, join(pen, [before, part], move.axis, aside=True), Gather(move.axis, order))
    raise NoSpelling("it writes through a view that repeats values; write to the tensor itself")


def join(pen: Pen, parts: Sequence[Value | Tensor], axis: int, *, aside: bool = False) -> Value | Tensor:
    """Return a concatenation; zeros become padding.

    Raises:
        NoSpelling: If it joins images of the batch, or constants that are not zero.
    """
    parts = [part for part in parts if part.shape[axis] > 0]
    if axis == 0:
        raise NoSpelling(BATCH)
    if not any(isinstance(part, Value) for part in parts):
        return torch.cat([part for part in parts if isinstance(part, Tensor)], axis)
    values, zeros = list[Value](), list[list[int]]()
    leading = 0
    for part in parts:
        if isinstance(part, Value):
            values.append(part)
            zeros.append([leading, 0])
            leading = 0
            continue
        if pen.constant(part).learned or bool((part != 0).any()):
            raise NoSpelling(
                "it joins activations with constants other than zero; add a layer with an offset (y + offset), or pass "
                "them as channels of the images"
            )
        if values:
            zeros[-1][1] += part.shape[axis]
        else:
            leading += part.shape[axis]
    alone = len(values) == 1
    padded = [
        pad(pen, value, axis, *amounts, aside=aside or not alone) for value, amounts in zip(values, zeros, strict=True)
    ]
    if alone and (aside or len(parts) > 1):
        return padded[0]
    return pen.emit(Concat(axis), *padded, aside=aside)


def pad(pen: Pen, value: Value, axis: int, before: int, after: int, *, aside: bool = False) -> Value:
    """Return ``value`` with zeros before and after one axis."""
    if before == after == 0:
        return value
    sizes = [[0] * len(value.shape), [0] * len(value.shape)]
    sizes[0][axis], sizes[1][axis] = before, after
    return pen.emit(Pad(*sizes), value, aside=aside)


# -- moves that are not views ------------------------------------------------------------------------------------------


def cat(pen: Pen, call: Call) -> Value | Tensor:
    """Spell a concatenation."""
    parts = [part for part in call["tensors"] if tuple(part.shape) != (0,)]
    return join(pen, parts, axis_of(call["dim"], len(call.shape)))


def copy(pen: Pen, call: Call) -> Value:
    """Spell a copy, which has the values of its source."""
    value = call.value()
    dtype = call.get("dtype")
    if dtype is not None and dtype != value.tensor.dtype:
        raise NoSpelling(f"it computes in {str(dtype).removeprefix('torch.')}; remove the cast and give float32 images")
    return value


def constant_pad(pen: Pen, call: Call) -> Value:
    """Spell padding with zeros; negative amounts crop."""
    if call["value"] != 0:
        raise NoSpelling(f"it pads with {call['value']}, which may not be on the grid; use zeros")
    value, amounts = call.value(), list(call["pad"])
    rank = len(value.shape)
    amounts += [0] * (2 * rank - len(amounts))
    pairs = [(amounts[2 * i], amounts[2 * i + 1]) for i in reversed(range(rank))]
    for axis, (before, after) in enumerate(pairs):
        crop = _sliced(value.shape, axis, max(-before, 0), value.shape[axis] - max(-after, 0))
        value = apply(pen, value, crop, aside=True)
    if pairs[0] != (0, 0):
        raise NoSpelling(BATCH)
    kept = [[max(pair[side], 0) for pair in pairs] for side in (0, 1)]
    return value if not any(map(any, kept)) else pen.emit(Pad(*kept), value)


def gather(pen: Pen, value: Value, axis: int, indices: Any) -> Value:
    """Return chosen indices along one axis."""
    if axis == 0:
        raise NoSpelling(BATCH)
    return pen.emit(Gather(axis, [int(index) for index in indices]), value)


def flip(pen: Pen, call: Call) -> Value:
    """Spell a flip of axes."""
    value = call.value()
    for axis in call["dims"]:
        place = axis_of(axis, len(value.shape))
        value = gather(pen, value, place, reversed(range(value.shape[place])))
    return value


def roll(pen: Pen, call: Call) -> Value:
    """Spell a roll along axes."""
    value = call.value()
    if not call["dims"]:
        raise NoSpelling(BATCH)
    for shift, axis in zip(call["shifts"], call["dims"], strict=True):
        place = axis_of(axis, len(value.shape))
        value = gather(pen, value, place, torch.arange(value.shape[place]).roll(shift).tolist())
    return value


def index_select(pen: Pen, call: Call) -> Value:
    """Spell a selection of indices along one axis."""
    indices = call.fixed("index")
    return gather(pen, call.value(), axis_of(call["dim"], len(call.value().shape)), indices.tolist())  # type: ignore[union-attr]


def index(pen: Pen, call: Call) -> Value:
    """Spell ``x[:, indices]`` with constant indices of one axis."""
    found = [(axis, given) for axis, given in enumerate(call["indices"]) if given is not None]
    if len(found) != 1 or isinstance(found[0][1], Value) or found[0][1].dim() != 1:
        raise NoSpelling("it picks values by several index tensors, or by computed ones; index one axis with constants")
    axis, given = found[0]
    chosen = given.nonzero().flatten() if given.dtype in (torch.bool, torch.uint8) else given
    return gather(pen, call.value(), axis, (chosen % call.value().shape[axis]).tolist())


def repeat(pen: Pen, call: Call) -> Value:
    """Spell a tensor repeated along axes."""
    value, times = call.value(), list(call["repeats"])
    if len(times) != len(value.shape):
        raise NoSpelling(BATCH)
    for axis, count in enumerate(times):
        if count != 1:
            value = gather(pen, value, axis, list(range(value.shape[axis])) * count)
    return value


def pixel_shuffle(pen: Pen, call: Call) -> Value:
    """Spell the rearrangement of channels into pixels of a larger image."""
    value, factor = call.value(), int(call["upscale_factor"])
    _, channels, height, width = value.shape
    channels //= factor**2
    value = pen.emit(Reshape((channels, factor, factor, height, width)), value, aside=True)
    value = pen.emit(Permute((0, 1, 4, 2, 5, 3)), value, aside=True)
    return pen.emit(Reshape((channels, height * factor, width * factor)), value)


def pixel_unshuffle(pen: Pen, call: Call) -> Value:
    """Spell the rearrangement of pixels into channels of a smaller image."""
    value, factor = call.value(), int(call["downscale_factor"])
    _, channels, height, width = value.shape
    height, width = height // factor, width // factor
    value = pen.emit(Reshape((channels, height, factor, width, factor)), value, aside=True)
    value = pen.emit(Permute((0, 1, 3, 5, 2, 4)), value, aside=True)
    return pen.emit(Reshape((channels * factor**2, height, width)), value)


def channel_shuffle(pen: Pen, call: Call) -> Value:
    """Spell the interleaving of channel groups."""
    value, groups = call.value(), int(call["groups"])
    channels, rest = value.shape[1], value.shape[2:]
    value = pen.emit(Reshape((groups, channels // groups, *rest)), value, aside=True)
    order = (0, 2, 1, *range(3, 3 + len(rest)))
    return pen.emit(Reshape((channels, *rest)), pen.emit(Permute(order), value, aside=True))


def upsample_nearest(pen: Pen, call: Call) -> Value:
    """Spell nearest-neighbor resizing: torch itself resizes a ramp of indices, so it rounds as torch does."""
    value = call.value()
    operator = getattr(torch.ops.aten, call.name).default
    scales = [call[name] for name in ("scales_h", "scales_w")]
    height, width = value.shape[2:]
    ramp = torch.arange(height * width, dtype=torch.float64).reshape(1, 1, height, width)
    sources = operator(ramp, list(call["output_size"]), *scales)[0, 0].long()
    value = gather(pen, value, 2, (sources[:, 0] // width).tolist())
    return gather(pen, value, 3, (sources[0] % width).tolist())


class Stack(nn.Module):
    """Tensors stacked on a new axis; a sum over that axis is a sum of the tensors.

    Args:
        axis: The new axis.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors, self.axis)


def stack(pen: Pen, call: Call) -> Value:
    """Spell a stack; it is lowered once its readers are known."""
    parts = call["tensors"]
    if not all(isinstance(part, Value) for part in parts):
        raise NoSpelling("it stacks activations with constants; add a layer with an offset (y + offset)")
    value = pen.emit(Stack(axis_of(call["dim"], len(call.shape))), *parts)
    pen.stacks[value.node] = tuple(parts)
    return value


def volume(shape: Sequence[int]) -> int:
    """Return the number of values of a shape."""
    return math.prod(shape)
