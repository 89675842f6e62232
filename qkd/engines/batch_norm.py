"""Batch norm with the statistics of the whole batch, although each process has only a share of it.

A layer keeps its class, its parameters and its state names; only its training forward is replaced while the block is
open. So a net that fuses a convolution with its batch norm, or looks for batch norm by class, notices nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers.fused import batch_norm as fused
from quantizers.fused.batch_norm import SHARED
from quantizers.kernels import compiled_for

Reduce = Callable[[Tensor], None]
"""Sums a tensor over all processes, in place."""


@contextmanager
def synchronized(modules: Iterable[nn.Module], reduce: Reduce, is_shared: Callable[[], bool]) -> Iterator[None]:
    """Let every batch norm below these modules use the statistics of whole batches within a block.

    Args:
        modules: Searched once, at the start.
        reduce: Sums over the processes.
        is_shared: Whether a layer's input is a share of a batch at the moment, rather than a whole one.
    """
    layers = dict.fromkeys(layer for module in modules for layer in module.modules() if isinstance(layer, _BatchNorm))
    for layer in layers:
        layer.__dict__["forward"] = _forward_of(layer, reduce, is_shared)  # shadows the class's forward
        layer.__dict__[SHARED] = lambda: reduce if is_shared() else None  # for code that fuses it with the next layer
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            layer.__dict__.pop(SHARED, None)


def _forward_of(layer: _BatchNorm, reduce: Reduce, is_shared: Callable[[], bool]) -> Callable[[Tensor], Tensor]:
    own = type(layer).forward

    def forward(x: Tensor) -> Tensor:
        if not layer.training or not is_shared():
            return own(layer, x)
        if fused.takes(x, layer):
            return fused.batch_norm(x, layer, compiled_for)  # type: ignore[arg-type]
        layer._check_input_dim(x)  # type: ignore[no-untyped-call]
        weight = torch.ones(x.shape[1], device=x.device) if layer.weight is None else layer.weight
        bias = torch.zeros(x.shape[1], device=x.device) if layer.bias is None else layer.bias
        out, mean, var, count = cast(Any, _WholeBatchNorm.apply)(x, weight, bias, layer.eps, reduce)
        _follow(layer, mean, var, count)
        return cast(Tensor, out)

    return forward


@torch.no_grad()
def _follow(layer: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Update the running statistics as PyTorch does, with the unbiased variance."""
    if not layer.track_running_stats or layer.running_mean is None or layer.running_var is None:
        return
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None and layer.num_batches_tracked is not None:
        momentum = 1.0 / float(layer.num_batches_tracked)
    unbiased = var * (count / (count - 1).clamp_min(1))
    for running, value in ((layer.running_mean, mean), (layer.running_var, unbiased)):
        running.lerp_(value.to(running.dtype), momentum or 0.0)


class _WholeBatchNorm(torch.autograd.Function):
    """Normalize by statistics over all processes, with sums in float64 to avoid cancellation."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, reduce: Reduce
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the normalized ``x``; mean and variance per channel, ``[channels]``; values per channel, ``[]``."""
        own_mean, own_var = _statistics(x)
        channels, count = x.shape[1], x.numel() // x.shape[1]
        mean, var = own_mean.double(), own_var.double()
        sums = torch.cat([mean * count, (var + mean.square()) * count, mean.new_full((1,), count)])
        reduce(sums)
        total = sums[-1]
        mean = sums[:channels] / total
        var = (sums[channels:-1] / total - mean.square()).clamp_min(0)
        mean, var = mean.float(), var.float()
        out = functional.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps, ctx.reduce = eps, reduce
        ctx.mark_non_differentiable(mean, var, total)
        return out, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient of all processes' summed losses by this one's ``x``, and its share of the others."""
        x, weight, mean, var, total = ctx.saved_tensors
        by_x, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradient.contiguous(memory_format=_format(x)), x, weight, mean, var, None, None, False, ctx.eps,
            [True, True, True],
        )  # fmt: skip
        sums = torch.cat([by_weight.double(), by_bias.double()])
        ctx.reduce(sums)
        by_scaled, by_shift = (sums / total).chunk(2)
        factor = torch.rsqrt(var.double() + ctx.eps)
        slope = weight.double() * factor.square() * by_scaled
        offset = weight.double() * factor * by_shift - slope * mean.double()
        shape = (1, -1, *(1,) * (x.dim() - 2))
        slope, offset = (value.to(by_x.dtype).reshape(shape) for value in (slope, offset))
        return by_x.addcmul_(x, slope, value=-1).sub_(offset), by_weight, by_bias, None, None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel."""
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous() and x.shape[2:].numel() > 1:
        # faster, and as accurate: it sums planes in float64 (but channels without planes in float32)
        return torch.batch_norm_update_stats(x, None, None, 0.0)
    var, mean = torch.var_mean(x.float(), dim=_all_but_channels(x), correction=0)
    return mean, var


def _all_but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.dim()) if axis != 1]


def _format(x: Tensor) -> torch.memory_format:
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
