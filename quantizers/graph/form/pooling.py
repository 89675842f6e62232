"""Adaptive pooling as pooling with equal windows, even where the network's windows are uneven."""

from __future__ import annotations

import math

from torch import nn

from quantizers.layers import GlobalAveragePool, WindowGather


def adaptive_pool(size: tuple[int, int], target: tuple[int, int]) -> tuple[WindowGather | None, nn.Module | None, int]:
    """Return adaptive average pooling as (gather of windows or None, pooling or None, values averaged).

    Window ``i`` of ``n`` over ``size`` values spans ``floor(i * size / n)`` to ``ceil((i + 1) * size / n)``.
    Where windows differ in length, values are repeated until all have the same length, which preserves the means.
    """
    if size == target:
        return None, None, 1
    if target == (1, 1):
        return None, GlobalAveragePool(keepdims=True), size[0] * size[1]
    rows, row_length = even_windows(size[0], target[0])
    columns, column_length = even_windows(size[1], target[1])
    kernel = (row_length, column_length)
    pool = None if kernel == (1, 1) else nn.AvgPool2d(kernel, kernel)
    even = rows == list(range(size[0])) and columns == list(range(size[1]))
    return None if even else WindowGather(rows, columns), pool, row_length * column_length


def even_windows(size: int, target: int) -> tuple[list[int], int]:
    """Return adaptive windows as (source index of each value, values per window), with values repeated to even them."""
    spans = [range(i * size // target, -(-(i + 1) * size // target)) for i in range(target)]
    length = math.lcm(*(len(span) for span in spans))
    return [value for span in spans for value in span for _ in range(length // len(span))], length
