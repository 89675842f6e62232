"""Find the shape of every edge of an integer view from the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from quantizers import integer as ir

Sizes = tuple[int, ...]


def edge_shapes(view: ir.IntegerView, input_shapes: Sequence[Sizes]) -> dict[str, Sizes]:
    """Return edge -> shape, the batch first.

    Args:
        view: What the student computes.
        input_shapes: A shape for each input, batch first.

    Raises:
        ValueError: If the number of shapes is wrong, or a node cannot take its input's shape (the message names it).
    """
    if len(input_shapes) != len(view.inputs):
        raise ValueError(f"the view has {len(view.inputs)} inputs, got {len(input_shapes)} shapes")
    shapes: dict[str, Sizes] = dict(zip(view.inputs, map(tuple, input_shapes), strict=True))
    for node in view.nodes:
        met = [shapes[edge] for edge in node.inputs]
        try:
            shapes[node.output] = RULES[type(node)](node, met)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{node.name}: {type(node).__name__} cannot take {met}: {error}") from error
    return shapes


def _same(node: ir.Node, met: Sequence[Sizes]) -> Sizes:
    return met[0]


def _conv(node: ir.Conv, met: Sequence[Sizes]) -> Sizes:
    batch, channels, *image = _four(met[0])
    if channels != node.weights.shape[1] * node.groups:
        raise ValueError(f"it has {node.weights.shape[1] * node.groups} input channels")
    windows = _windows(image, node.weights.shape[2:], node.stride, node.padding, node.dilation, ceil_mode=False)
    return (batch, node.weights.shape[0], *windows)


def _linear(node: ir.Linear, met: Sequence[Sizes]) -> Sizes:
    if met[0][-1] != node.weights.shape[1]:
        raise ValueError(f"it has {node.weights.shape[1]} input features")
    return (*met[0][:-1], node.weights.shape[0])


def _pool(node: ir.MaxPool | ir.AveragePool, met: Sequence[Sizes]) -> Sizes:
    batch, channels, *image = _four(met[0])
    dilation = node.dilation if isinstance(node, ir.MaxPool) else (1, 1)
    windows = _windows(image, node.kernel, node.stride, node.padding, dilation, ceil_mode=node.ceil_mode)
    return (batch, channels, *windows)


def _windows(
    image: Sequence[int], kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes, *, ceil_mode: bool
) -> Sizes:
    """Return how many windows fit by PyTorch's rule: none starts in the padding after the image."""
    counts = []
    for axis, size in enumerate(image):
        room = size + padding[axis] + padding[axis + 2] - dilation[axis] * (kernel[axis] - 1) - 1
        count = (-(-room // stride[axis]) if ceil_mode else room // stride[axis]) + 1
        if ceil_mode and (count - 1) * stride[axis] >= size + padding[axis]:
            count -= 1
        if count < 1:
            raise ValueError(f"no window of {kernel} fits")
        counts.append(count)
    return tuple(counts)


def _broadcast(node: ir.Node, met: Sequence[Sizes]) -> Sizes:
    first, second = met[0], met[-1]
    if len(first) != len(second) or any(a != b and 1 not in (a, b) for a, b in zip(first, second, strict=True)):
        raise ValueError("they do not fit each other")
    return tuple(max(pair) for pair in zip(first, second, strict=True))


def _concat(node: ir.Concat, met: Sequence[Sizes]) -> Sizes:
    axis = node.axis % len(met[0])
    return (*met[0][:axis], sum(shape[axis] for shape in met), *met[0][axis + 1 :])


def _global_mean(node: ir.GlobalAveragePool, met: Sequence[Sizes]) -> Sizes:
    image = _four(met[0])
    return (*image[:2], 1, 1) if node.keepdims else image[:2]


def _four(shape: Sizes) -> Sizes:
    if len(shape) != 4:
        raise ValueError("it takes [batch, channels, height, width]")
    return shape


def _flatten(shape: Sizes, settings: Any) -> Sizes:
    axis = int(settings.get("axis", 1))
    return (*shape[:axis], prod(shape[axis:]))


def _reshape(shape: Sizes, settings: Any) -> Sizes:
    wanted = [shape[place] if size == 0 else size for place, size in enumerate(settings["shape"])]
    known = prod(size for size in wanted if size != -1)
    if (-1 in wanted and prod(shape) % known) or (-1 not in wanted and prod(shape) != known):
        raise ValueError(f"it has {prod(shape)} values, not those of {wanted}")
    return tuple(prod(shape) // known if size == -1 else size for size in wanted)


def _cut(shape: Sizes, settings: Any) -> Sizes:
    axis = settings["axis"] % len(shape)
    count = len(range(shape[axis])[slice(settings["start"], settings.get("end"), settings.get("step", 1))])
    return (*shape[:axis], count, *shape[axis + 1 :])


def _gather(shape: Sizes, settings: Any) -> Sizes:
    axis = settings["axis"] % len(shape)
    return (*shape[:axis], len(settings["indices"]), *shape[axis + 1 :])


def _pad(shape: Sizes, settings: Any) -> Sizes:
    pairs = zip(shape, settings["before"], settings["after"], strict=True)
    return tuple(before + size + after for size, before, after in pairs)


def _expand(shape: Sizes, settings: Any) -> Sizes:
    pairs = list(zip(shape, settings["shape"], strict=True))
    if any(size != wanted and 1 not in (size, wanted) for size, wanted in pairs):
        raise ValueError(f"it cannot become {settings['shape']}")
    return tuple(max(pair) for pair in pairs)


MOVES: dict[str, Callable[[Sizes, Any], Sizes]] = {
    "expand": _expand,
    "flatten": _flatten,
    "gather": _gather,
    "identity": lambda shape, settings: shape,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _cut,
    "transpose": lambda shape, settings: tuple(shape[axis] for axis in settings["perm"]),
}

RULES: dict[type[ir.Node], Callable[[Any, Sequence[Sizes]], Sizes]] = {
    ir.Add: _broadcast,
    ir.AveragePool: _pool,
    ir.Concat: _concat,
    ir.Conv: _conv,
    ir.Function: _same,
    ir.GlobalAveragePool: _global_mean,
    ir.Linear: _linear,
    ir.MaxPool: _pool,
    ir.Mul: _broadcast,
    ir.Quantize: _same,
    ir.Shape: lambda node, met: MOVES[node.op](met[0], node.attributes),
}
