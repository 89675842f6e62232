"""Pooling of a float graph as modules with plain windows, even where the network asked for adaptive ones."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import fx, nn

from quantizers.graph.trace import MAXPOOL, RewriteError, Traced, pair
from quantizers.layers import GlobalAveragePool, WindowGather

_MAX_PARAMETERS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVG_PARAMETERS = (
    "input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override",
)  # fmt: skip


def pool_module(traced: Traced, node: fx.Node) -> nn.MaxPool2d | nn.AvgPool2d:
    """Return the max or average pooling of ``node`` as a module with pairs for window and stride.

    Raises:
        RewriteError: If it returns indices or overrides its divisor.
    """
    is_max = node.meta["kind"] == MAXPOOL
    arguments = _arguments(traced, node, _MAX_PARAMETERS if is_max else _AVG_PARAMETERS)
    if arguments.get("return_indices") or arguments.get("divisor_override"):
        raise RewriteError(
            f"{traced.path(node)}: pooling with indices or another divisor has no integer kernel; use plain pooling"
        )
    kernel = pair(arguments["kernel_size"])
    stride = pair(arguments["stride"]) if arguments.get("stride") else kernel
    padding, ceil = pair(arguments.get("padding") or 0), bool(arguments.get("ceil_mode", False))
    if is_max:
        return nn.MaxPool2d(kernel, stride, padding, pair(arguments.get("dilation") or 1), ceil_mode=ceil)
    return nn.AvgPool2d(kernel, stride, padding, ceil, bool(arguments.get("count_include_pad", True)))


def _arguments(traced: Traced, node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    module = traced.module(node)
    if module is not None:
        known = inspect.signature(type(module).__init__).parameters
        return {name: getattr(module, name) for name in names if name in known}
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def spatial_mean(traced: Traced, node: fx.Node) -> tuple[GlobalAveragePool, int]:
    """Return a mean over height and width as (module, values averaged).

    Raises:
        RewriteError: If it averages anything but the last two of four dimensions.
    """
    shape = node.all_input_nodes[0].meta["shape"]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", range(len(shape)))
    dims = (dims,) if isinstance(dims, int) else dims
    if len(shape) != 4 or sorted(int(d) % 4 for d in dims) != [2, 3]:  # type: ignore[union-attr, arg-type]
        raise RewriteError(
            f"{traced.path(node)}: a mean over {tuple(dims)} of {shape} has no integer kernel; "  # type: ignore[arg-type]
            "average height and width of a 4-d tensor in one call, x.mean((2, 3))"
        )
    return GlobalAveragePool(keepdims=len(node.meta["shape"]) == 4), shape[2] * shape[3]


def adaptive_pool(size: tuple[int, int], target: tuple[int, int]) -> tuple[WindowGather | None, nn.Module | None, int]:
    """Return adaptive average pooling as (gather of windows or None, pooling or None, values averaged).

    Window ``i`` of ``n`` over ``size`` values reaches from ``floor(i * size / n)`` to ``ceil((i + 1) * size / n)``.
    Where windows differ in length, values are repeated until all have one length, which leaves the means as they are.
    """
    if size == target:
        return None, None, 1
    if target == (1, 1):
        return None, GlobalAveragePool(keepdims=True), size[0] * size[1]
    rows, row_length = _windows(size[0], target[0])
    columns, column_length = _windows(size[1], target[1])
    kernel = (row_length, column_length)
    pool = None if kernel == (1, 1) else nn.AvgPool2d(kernel, kernel)
    even = rows == list(range(size[0])) and columns == list(range(size[1]))
    return None if even else WindowGather(rows, columns), pool, row_length * column_length


def _windows(size: int, target: int) -> tuple[list[int], int]:
    spans = [range(i * size // target, -(-(i + 1) * size // target)) for i in range(target)]
    length = math.lcm(*(len(span) for span in spans))
    return [value for span in spans for value in span for _ in range(length // len(span))], length
