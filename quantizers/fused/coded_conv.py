"""Convolutions of a training step that multiply codes as 8-bit integers, and scale afterward.

The products of codes are integers, summed exactly, so that only the final scaling rounds. Gradients are those of the
convolution of the dequantized values. oneDNN has such kernels for x86. They take about half the time of float32 with
AVX2, and of bfloat16 with AVX-512. They gain nothing over bfloat16 in AMX tiles, which needs no codes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from quantizers.fused.batch_norm import Compiled, is_channels_last
from quantizers.native.building import is_x86
from quantizers.native.fake_quant import NativeQuant

MOST_BITS = 4  # AVX2 sums two products in 16 bits, which 15 * 8 + 15 * 8 does not overflow


def takes(x: Tensor, conv: nn.Conv2d) -> bool:
    """Return whether :func:`coded_conv` computes a convolution of values on an unsigned grid of at most four bits.

    Args:
        x: The values.
        conv: Its weights are on a grid of at most four bits.
    """
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.enabled or not _has_kernels(x.dtype) or conv.weight.dtype is not torch.float32:
        return False
    is_plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return is_channels_last(x) and is_plain and conv.bias is None and x.dtype is multiplied_in(x)


def coded_conv(
    x: Tensor, weight: Tensor, x_step: Tensor, weight_step: Tensor, conv: nn.Conv2d, compiled: Compiled
) -> Tensor:
    """Return the convolution of values on grids, computed from their codes.

    Args:
        x: Codes of 0 to 15 times their step, ``[batch, channels, height, width]``, for which :func:`takes` holds.
        weight: Codes of -8 to 8 times theirs, float32 ``[out_channels, channels, height, width]``.
        x_step: Shape ``[]``.
        weight_step: One for each output channel, or one.
        conv: Stride, padding and dilation.
        compiled: Returns the compiled functions.

    Returns:
        In the dtype of ``x``. A NaN has no code: where there is one, the values are multiplied themselves.
    """
    return _CodedConv.apply(x, weight, x_step, weight_step, conv, compiled)  # type: ignore[no-any-return]


@functools.cache
def _has_kernels(dtype: torch.dtype) -> bool:
    """Return whether faster kernels exist: bfloat16 is slow without AVX-512, and as fast as codes in AMX tiles."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not is_x86() or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype is torch.bfloat16:
        fits = capability == "AVX512" and not has_tiles()
    else:
        fits = dtype is torch.float32 and "AVX" in capability
    return fits and hasattr(torch.ops.onednn, "qconv2d_pointwise") and hasattr(torch.ops.onednn, "qconv_prepack")


def has_tiles() -> bool:
    """Return whether the processor multiplies bfloat16 in AMX tiles; False if this version of PyTorch cannot tell."""
    asked = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(asked is not None and asked())


def multiplied_in(x: Tensor) -> torch.dtype:
    """Return the dtype that a convolution of a tensor multiplies in: autocast's if it is enabled, else the tensor's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _CodedConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, x_step: Tensor, weight_step: Tensor, conv: nn.Conv2d, compiled: Compiled
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.place = place = (list(conv.stride), list(conv.padding), list(conv.dilation))
        steps = weight_step.detach().reshape(-1).expand(weight.size(0)).contiguous()
        rounded = torch.round(weight.detach() / steps.view(-1, 1, 1, 1))
        qx = _codes(x, x_step, compiled(x))
        if qx is None or bool(rounded.isnan().any()):
            return torch.conv2d(x, weight.to(x.dtype), None, conv.stride, conv.padding, conv.dilation)
        codes = rounded.to(torch.int8).contiguous()
        scale, zeros = float(x_step), torch.zeros(len(steps), dtype=torch.int32)
        onednn = torch.ops.onednn
        packed = onednn.qconv_prepack(codes, steps, scale, 0, *place, 1, list(x.shape))
        return onednn.qconv2d_pointwise(  # type: ignore[no-any-return]
            qx, scale, 0, packed, steps, zeros, None, *place, 1, 1.0, 0, x.dtype, "none", [], ""
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        like = weight.to(x.dtype)
        by_x, by_weight, _ = torch.ops.aten.convolution_backward(
            grad.to(x.dtype), x, like, None, *ctx.place, False, [0, 0], 1, wanted
        )  # fmt: skip
        return by_x, None if by_weight is None else by_weight.to(weight.dtype), None, None, None, None


def _codes(x: Tensor, step: Tensor, native: NativeQuant | None) -> Tensor | None:
    """Return the codes of values on an unsigned grid, uint8 in the memory format of ``x``; None if one is NaN."""
    if native is None:
        rounded = torch.round(x.float() / step)
        return None if bool(rounded.isnan().any()) else rounded.to(torch.uint8)
    out = torch.empty_like(x, dtype=torch.uint8)
    nans = native.codes(
        x.data_ptr(), out.data_ptr(), x.numel(), step.data_ptr(), x.dtype is torch.bfloat16, torch.get_num_threads()
    )
    return None if nans else out
