"""Calls to the compiled batch norm: channel sums, values on their grid, gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantizers.native.fake_quant import NativeQuant, tree_sum
from quantizers.native.source import BLOCK

LEAST_LANES = 256  # of a part: enough for the widest vectors and for short sums
LEAST_PART = 65536  # values that one thread sums at a time


@dataclass(frozen=True)
class Row:
    """How a dense channels_last tensor is traversed: as one row, in parts, each summed in lanes.

    Args:
        values: Total number of values.
        channels: Fastest in memory.
        width: Lanes of a part, a multiple of the channels.
        part: Values of a part, a multiple of lanes and of the blocks of a step size's sum.
    """

    values: int
    channels: int
    width: int
    part: int

    @property
    def parts(self) -> int:
        """Return the number of parts; the last may be short."""
        return -(-self.values // self.part)


def row_of(x: Tensor) -> Row:
    """Return how a tensor ``[batch, channels, height, width]`` is traversed."""
    channels = x.size(1)
    width = channels * -(-LEAST_LANES // channels)
    unit = math.lcm(width, BLOCK)
    return Row(x.numel(), channels, width, unit * -(-LEAST_PART // unit))


def statistics(native: NativeQuant | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each channel's sum and sum of squared distances from the rounded mean, in float64, and that mean by lane.

    Args:
        native: The compiled functions, or None for PyTorch's operations, which give the same bits.
        x: Dense in channels_last, float32 or bfloat16, ``[batch, channels, height, width]``.
    """
    row = row_of(x)
    if native is None:
        values = _flat(x).float()
        sums = _channel_sums(_lanes(values, row), row)
        mean = (sums / (row.values // row.channels)).float().repeat(row.width // row.channels)
        return sums, _channel_sums(_lanes(_centered(values, mean, row).square(), row), row), mean
    mean, lanes = torch.empty(row.width), torch.empty(row.parts * row.width)
    sums, squares = torch.empty(2, row.channels, dtype=torch.float64)
    native.norm_statistics(
        x.data_ptr(), row.values, row.channels, row.part, row.width, mean.data_ptr(), lanes.data_ptr(),
        sums.data_ptr(), squares.data_ptr(), x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return sums, squares, mean


def moments(
    native: NativeQuant | None, sums: Tensor, squares: Tensor, rounded: Tensor, count: float
) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, each float64 ``[channels]``, from the results of :func:`statistics`."""
    channels = len(sums)
    if native is None:
        mean = sums / count
        return mean, (squares / count - (mean - rounded[:channels].double()).square()).clamp_min(0)
    mean, var = torch.empty(channels, dtype=torch.float64), torch.empty(channels, dtype=torch.float64)
    native.norm_moments(
        sums.data_ptr(), squares.data_ptr(), rounded.data_ptr(), count, channels, mean.data_ptr(), var.data_ptr()
    )
    return mean, var


@dataclass(frozen=True)
class Scaling:
    """How a training step scales each channel.

    Args:
        table: Mean, factor and shift of each lane, float32 ``[3, lanes]``.
        brief: Mean, unbiased variance and factor of each channel, float32 ``[3, channels]``.
        spread: One over the standard deviation of each channel, float64 ``[channels]``.
    """

    table: Tensor
    brief: Tensor
    spread: Tensor


def scaling(
    native: NativeQuant | None, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float,
    count: float,
) -> Scaling:  # fmt: skip
    """Return how channels are scaled.

    Args:
        native: As for :func:`statistics`.
        x: Likewise.
        mean: Of each channel, float64 ``[channels]``.
        var: Biased variance, likewise.
        weight: Float32 ``[channels]``.
        bias: Likewise.
        eps: Added to the variance.
        count: Values per channel.
    """
    row, ratio = row_of(x), count / max(count - 1, 1.0)
    if native is None:
        spread = 1.0 / torch.sqrt(var + eps)
        factor = (weight.double() * spread).float()
        shift = (bias.double() - mean * factor.double()).float()
        brief = torch.stack((mean.float(), (var * ratio).float(), factor))
        return Scaling(_by_lane(row, torch.stack((brief[0], factor, shift))), brief, spread)
    weight, bias = weight.contiguous(), bias.contiguous()
    table, brief = torch.empty(3, row.width), torch.empty(3, row.channels)
    spread = torch.empty(row.channels, dtype=torch.float64)
    native.norm_table(
        mean.data_ptr(), var.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps, ratio, row.channels, row.width,
        table.data_ptr(), brief.data_ptr(), spread.data_ptr(),
    )  # fmt: skip
    return Scaling(table, brief, spread)


def ends(
    native: NativeQuant | None, x: Tensor, scaled: Scaling, offsets: Tensor, slopes: Tensor, count: float
) -> Tensor:
    """Return the table of :func:`finished`: mean, factor, slope and offset of each lane, float32 ``[4, lanes]``.

    Args:
        native: As for :func:`statistics`.
        x: Likewise.
        scaled: From the forward pass.
        offsets: Each channel's sum of the gradient, over all processes, float64 ``[channels]``.
        slopes: Each channel's sum of the gradient times ``x - mean``, likewise.
        count: Values per channel, likewise.
    """
    row, factor = row_of(x), scaled.brief[2]
    if native is None:
        each = factor.double() / -count
        slope, offset = (each * scaled.spread.square() * slopes).float(), (each * offsets).float()
        return torch.cat((scaled.table[:2], _by_lane(row, torch.stack((slope, offset)))))
    table, offsets, slopes = torch.empty(4, row.width), offsets.contiguous(), slopes.contiguous()
    native.norm_ends(
        scaled.table.data_ptr(), factor.data_ptr(), scaled.spread.data_ptr(), offsets.data_ptr(), slopes.data_ptr(),
        count, row.channels, row.width, table.data_ptr(),
    )  # fmt: skip
    return table


def _by_lane(row: Row, of_channels: Tensor) -> Tensor:
    """Return values of channels ``[n, channels]`` for each lane, ``[n, lanes]``."""
    return of_channels.repeat(1, row.width // row.channels)


def normalized(native: NativeQuant | None, x: Tensor, table: Tensor, grid: Tensor | None) -> Tensor:
    """Return ``x * factor + shift`` per lane, in the dtype of ``x``, quantized if a grid is given.

    Args:
        native: As for :func:`statistics`.
        x: Likewise.
        table: Mean, factor and shift of each lane, float32 ``[3, lanes]``.
        grid: Step size, smallest and largest code, float32 ``[3]``; None if values are not rounded further.
    """
    row, (_, factor, shift) = row_of(x), table
    if native is None:
        out = _scaled(x, factor, shift)
        if grid is not None:
            step, low, high = grid
            out = (torch.clamp(torch.round(out.float() / step), low, high) * step).to(x.dtype)
        return out
    out = torch.empty_like(x)
    native.normalize(
        x.data_ptr(), out.data_ptr(), row.values, row.part, row.width, factor.data_ptr(), shift.data_ptr(),
        None if grid is None else grid.data_ptr(), x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out


def gradients(
    native: NativeQuant | None, grad: Tensor, x: Tensor, table: Tensor, grid: Tensor | None, *, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradient after the grid, each channel's sums of it and of it times ``x - mean``, and a step's terms.

    Args:
        native: As for :func:`statistics`.
        grad: Gradient of the output, in the dtype and memory format of ``x``.
        x: As for :func:`statistics`.
        table: Mean, factor and shift of each lane, float32 ``[3, lanes]``.
        grid: As for :func:`normalized`.
        residual: Whether values inside the grid contribute to the step size's gradient.

    Returns:
        The gradient in the dtype of ``x`` (``grad`` itself without a grid); two float64 ``[channels]``; float32 ``[]``.
    """
    row = row_of(x)
    if native is None:
        return _gradients(grad, x, table, grid, row, residual=residual)
    inner = grad if grid is None else torch.empty_like(x)
    lanes, blocks = torch.empty(2 * row.parts * row.width), torch.empty(2 * (row.values // BLOCK + 1))
    offsets, slopes = torch.empty(2, row.channels, dtype=torch.float64)
    total = torch.empty(())
    native.norm_gradients(
        grad.data_ptr(), x.data_ptr(), inner.data_ptr(), row.values, row.channels, row.part, row.width,
        table.data_ptr(), None if grid is None else grid.data_ptr(), residual, lanes.data_ptr(), blocks.data_ptr(),
        offsets.data_ptr(), slopes.data_ptr(), total.data_ptr(), x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return inner, offsets, slopes, total


def finished(native: NativeQuant | None, inner: Tensor, x: Tensor, table: Tensor, *, in_place: bool) -> Tensor:
    """Return the gradient of ``x``: ``inner * factor + ((x - mean) * slope + offset)``.

    Args:
        native: As for :func:`statistics`.
        inner: The gradient after the grid, in the dtype and memory format of ``x``.
        x: As for :func:`statistics`.
        table: Mean, factor, slope and offset of each lane, float32 ``[4, lanes]``.
        in_place: Whether to overwrite ``inner``.
    """
    row = row_of(x)
    if native is None:
        mean, factor, slope, offset = (_spread(one, x) for one in table)
        return (inner.float() * factor + ((x.float() - mean) * slope + offset)).to(x.dtype)
    out = inner if in_place else torch.empty_like(x)
    native.norm_finish(
        inner.data_ptr(), x.data_ptr(), out.data_ptr(), row.values, row.part, row.width, table.data_ptr(),
        x.dtype is torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _gradients(
    grad: Tensor, x: Tensor, table: Tensor, grid: Tensor | None, row: Row, *, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, factor, shift = table
    inner, total = grad, torch.zeros(())
    if grid is not None:
        step, low, high = grid
        v = _scaled(x, factor, shift).float() / step
        inside, end, nothing = (v > low) & (v < high), torch.clamp(v, low, high), torch.zeros_like(grad)
        inner = torch.where(inside, grad, nothing)
        slope = torch.where(inside, torch.round(v) - v, end) if residual else end
        total = tree_sum(_flat((grad if residual else torch.where(inside, nothing, grad)).float() * slope))
    flat = _flat(inner).float()
    distances = _centered(_flat(x).float(), mean, row)
    return inner, _channel_sums(_lanes(flat, row), row), _channel_sums(_lanes(flat * distances, row), row), total


def _flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1)


def _scaled(x: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
    return (x.float() * _spread(factor, x) + _spread(shift, x)).to(x.dtype)


def _spread(lanes: Tensor, x: Tensor) -> Tensor:
    """Return the value that all lanes of a channel hold, shaped to broadcast with ``x``."""
    return lanes[: x.size(1)].view(1, -1, 1, 1)


def _centered(values: Tensor, mean: Tensor, row: Row) -> Tensor:
    return (values.view(-1, row.channels) - mean[: row.channels]).view(-1)


def _lanes(values: Tensor, row: Row) -> Tensor:
    """Return the sums of each part's lanes, ``[parts, width]``, added up in the order of the row."""
    padded = torch.nn.functional.pad(values, (0, row.parts * row.part - row.values))
    total = torch.zeros(row.parts, row.width)
    for piece in padded.view(row.parts, -1, row.width).unbind(1):
        total = total + piece
    return total


def _channel_sums(lanes: Tensor, row: Row) -> Tensor:
    total = torch.zeros(row.channels, dtype=torch.float64)
    for piece in lanes.view(-1, row.channels).double().unbind(0):
        total = total + piece
    return total
