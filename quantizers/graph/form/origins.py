"""The input of an activation quantizer, where enough is known about it to settle its scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from quantizers.layers import ActQuantizer


class Origin:
    """The input of an activation quantizer that is an integer times a known unit (for :func:`settle`).

    Args:
        kind: ``add``, ``mul``, ``mean`` (of ``counts`` values), ``grid`` (another quantizer's output) or ``function``
            (of a value on a grid).
        sources: The quantizers of the operands.
        counts: Number of averaged values, or every number that occurs (windows at the border have fewer).
        function: The module of a ``function``.
    """

    def __init__(
        self,
        kind: str,
        sources: tuple[ActQuantizer, ...],
        counts: int | Iterable[int] = 1,
        function: nn.Module | None = None,
    ) -> None:
        self.kind, self.sources, self.function = kind, sources, function
        self.counts = (counts,) if isinstance(counts, int) else tuple(counts)

    @property
    def is_even_mean(self) -> bool:
        """Return whether it is a mean of an even number of values anywhere."""
        return self.kind == "mean" and any(count % 2 == 0 for count in self.counts)


def function_origin(source: ActQuantizer | None, function: nn.Module | None) -> Origin | None:
    """Return the origin of a function of a value on the grid of ``source``, or None if it has no grid."""
    return None if source is None else Origin("function", (source,), function=function)


def window_counts(pool: nn.AvgPool2d, size: Sequence[int]) -> tuple[int, ...]:
    """Return every number of values that a mean over windows divides by, ascending.

    Args:
        pool: Its windows.
        size: Height and width of its input.
    """
    heights, widths = (_axis_counts(pool, axis, int(size[axis])) for axis in (0, 1))
    return tuple(sorted({height * width for height in heights for width in widths}))


def _axis_counts(pool: nn.AvgPool2d, axis: int, size: int) -> set[int]:
    kernel, stride, padding = (_on_axis(value, axis) for value in (pool.kernel_size, pool.stride, pool.padding))
    room = size + 2 * padding - kernel
    windows = (-(-room // stride) if pool.ceil_mode else room // stride) + 1
    if pool.ceil_mode and (windows - 1) * stride >= size + padding:
        windows -= 1  # no window starts in the padding at the end
    starts = [window * stride - padding for window in range(windows)]
    if pool.count_include_pad:  # but not the overhang beyond the padding
        return {min(start + kernel, size + padding) - start for start in starts}
    return {min(start + kernel, size) - max(start, 0) for start in starts}


def _on_axis(value: int | tuple[int, int], axis: int) -> int:
    return value if isinstance(value, int) else int(value[axis])
