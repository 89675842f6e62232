"""Batch norm of a training step and the grid after it, in one forward and two backward passes over memory.

Together, torch's batch norm and a quantizer traverse a tensor nine times and keep two copies of it for the backward
pass; this takes six traversals and one copy. For dense channels_last tensors on a CPU. The result has the same bits
with and without a compiler (see :mod:`quantizers.native.batch_norm` for the order of summation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from quantizers.native import batch_norm as passes
from quantizers.native.fake_quant import NativeQuant

Compiled = Callable[[Tensor], NativeQuant | None]
"""Returns the compiled functions for a tensor; None if PyTorch's operations give the same bits."""
_HOOKS_OF_ALL = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip
SHARED = "sums_of_processes"  # in a layer's `__dict__`: returns what sums over all processes, None where it is alone


@dataclass(frozen=True)
class Grid:
    """The grid that a quantizer puts the values on.

    Args:
        step: Positive step size, float32 ``[]``.
        low: Smallest code, float32 ``[]``.
        high: Largest code, likewise.
        grad_scale: Factor on the step size's gradient.
        residual: Whether values inside the grid contribute to that gradient.
        function: :func:`quantizers.kernels.fake_quantize`, which can be differentiated twice.
    """

    step: Tensor
    low: Tensor
    high: Tensor
    grad_scale: float
    residual: bool
    function: Callable[..., Tensor]


def takes(x: Tensor, norm: nn.Module) -> bool:
    """Return whether :func:`batch_norm` computes what a layer would for this input.

    Args:
        x: What the layer would get.
        norm: A batch norm, or a layer derived from it.
    """
    if type(norm) is not nn.BatchNorm2d or not norm.training or torch.compiler.is_compiling() or is_watched(norm):
        return False
    if norm.momentum is None or not norm.track_running_stats or norm.running_mean is None:
        return False
    if norm.weight is None or norm.bias is None:
        return False
    if "forward" in norm.__dict__ and SHARED not in norm.__dict__:  # someone replaced its forward
        return False
    return is_channels_last(x) and x.size(1) == norm.num_features and NativeQuant.takes(x, norm.weight, norm.bias)


def is_channels_last(x: Tensor) -> bool:
    """Return whether a tensor is dense in channels_last, and not in the usual order as well."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def is_watched(module: nn.Module) -> bool:
    """Return whether a hook observes a module's inputs, outputs or their gradients; a backward hook replaces both."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or any(getattr(nn.modules.module, name) for name in _HOOKS_OF_ALL)


def batch_norm(x: Tensor, norm: nn.BatchNorm2d, compiled: Compiled, grid: Grid | None = None) -> Tensor:
    """Return a layer's output in training mode, quantized if a grid is given; updates its running statistics.

    Args:
        x: Shape ``[batch, channels, height, width]``, for which :func:`takes` holds.
        norm: The layer.
        compiled: Returns the compiled functions.
        grid: Grid of the quantizer after it. If None, the output is that of the layer.

    Returns:
        Same shape, dtype and memory format.
    """
    shared = norm.__dict__.get(SHARED)
    reduce = None if shared is None else shared()
    settings = (None, None, None) if grid is None else (grid.step, grid.low, grid.high)
    how = _How(norm, grid, reduce, compiled)
    return _BatchNorm.apply(x, norm.weight, norm.bias, *settings, how)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _How:
    norm: nn.BatchNorm2d
    grid: Grid | None
    reduce: Callable[[Tensor], None] | None
    compiled: Compiled


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, step: Tensor | None, low: Tensor | None,
        high: Tensor | None, how: _How,
    ) -> Tensor:  # fmt: skip
        native, grid, norm = how.compiled(x), None, how.norm
        if step is not None and low is not None and high is not None:
            grid = torch.stack((step, low, high))
        mean, var, count = _statistics(native, x, how.reduce)
        scaled = passes.scaling(native, x, mean, var, weight, bias, norm.eps, count)
        _follow(norm, scaled)
        ctx.save_for_backward(x, weight, bias, step, low, high, grid, scaled.table, scaled.brief, scaled.spread)
        ctx.count, ctx.how = count, how
        return passes.normalized(native, x, scaled.table, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and ctx.how.reduce is None:  # create_graph=True
            return _open_backward(ctx, grad)
        return _closed_backward(ctx, grad)


@once_differentiable
def _closed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, step, _, _, grid, *rest = ctx.saved_tensors
    scaled = passes.Scaling(*rest)
    how: _How = ctx.how
    native, scale, residual = how.compiled(x), 1.0, True
    if how.grid is not None:
        scale, residual = how.grid.grad_scale, how.grid.residual
    grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
    inner, offsets, slopes, total = passes.gradients(native, grad, x, scaled.table, grid, residual=residual)
    by_weight, by_bias = (slopes * scaled.spread).to(weight.dtype), offsets.to(bias.dtype)
    if how.reduce is not None:
        sums = torch.cat((offsets, slopes))
        how.reduce(sums)
        offsets, slopes = sums.chunk(2)
    table = passes.ends(native, x, scaled, offsets, slopes, ctx.count)
    by_x = passes.finished(native, inner, x, table, in_place=grid is not None)
    by_step = None if step is None else (total * scale).to(step.dtype).view_as(step)
    return by_x, by_weight, by_bias, by_step, None, None, None


def _open_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients as differentiable functions, through torch's own batch norm."""
    x, weight, bias, step, low, high, *_ = ctx.saved_tensors
    with torch.enable_grad():
        out = functional.batch_norm(x, None, None, weight, bias, training=True, eps=ctx.how.norm.eps)
        if (grid := ctx.how.grid) is not None:
            out = grid.function(out, step, low, high, grad_scale=grid.grad_scale, residual=grid.residual)
        inputs = [x, weight, bias, step]
        asked = [place for place, one in enumerate(inputs) if one is not None and one.requires_grad]
        found = torch.autograd.grad(out, [inputs[place] for place in asked], grad, create_graph=True)
    by = dict(zip(asked, found, strict=True))
    return (*(by.get(place) for place in range(4)), None, None, None)


def _statistics(
    native: NativeQuant | None, x: Tensor, reduce: Callable[[Tensor], None] | None
) -> tuple[Tensor, Tensor, float]:
    """Return mean and variance of each channel, float64 ``[channels]``, and the number of values per channel."""
    sums, squares, rounded = passes.statistics(native, x)
    count = float(x.numel() // x.size(1))
    mean, var = passes.moments(native, sums, squares, rounded, count)
    if reduce is None:
        return mean, var, count
    total = torch.cat((mean * count, (var + mean.square()) * count, mean.new_full((1,), count)))
    reduce(total)
    channels, count = x.size(1), float(total[-1])
    mean = total[:channels] / count
    return mean, (total[channels:-1] / count - mean.square()).clamp_min(0), count


@torch.no_grad()
def _follow(norm: nn.BatchNorm2d, scaled: passes.Scaling) -> None:
    """Update the running statistics as PyTorch does, with the unbiased variance."""
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    mean, unbiased, _ = scaled.brief
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        if running is not None:
            running.lerp_(value.to(running.dtype), norm.momentum or 0.0)
