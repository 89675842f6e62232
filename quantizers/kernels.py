"""Fake quantization as one fused forward and one fused backward pass, with the published gradient of the step size.

On a CPU, float32 and bfloat16 run as C++ (:mod:`quantizers.native`), other types and devices as kernels from PyTorch's
compiler. Compiled or not, the arithmetic on a CPU is bit-for-bit the same: each value in the precision of the step
size, each sum in the order of :func:`quantizers.native.fake_quant.tree_sum`. A backward pass that will itself be
differentiated (``create_graph=True``) runs unfused, as differentiable operations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantizers.native.building import cpp_compiler
from quantizers.native.fake_quant import NativeQuant, load, tree_sum

TINY = 1e-10  # smallest step size: keeps divisions finite when training drives a scale through zero
_log = logging.getLogger(__name__)


# The compiler keys its cache on the function, so per-tensor (rank 1) and per-channel (rank 2) calls have their own.
def _quantize_tensor(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    # A division, not a product with 1/scale: ONNX Runtime's QuantizeLinear divides, and ties must round alike.
    return torch.clamp(torch.round(_wide(x, scale) / scale), low, high) * scale


def _quantize_channel(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(torch.round(_wide(x, scale) / scale), low, high) * scale


def _wide(x: Tensor, scale: Tensor) -> Tensor:
    """Widen half precision: a compiler would keep intermediate results wide, eager arithmetic would not."""
    return x.to(torch.promote_types(x.dtype, scale.dtype))


# The terms of the step size's gradient are summed outside, since a compiled sum would add them in another order.
def _gradients(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    v = _wide(x, scale) / scale
    inside = (v > low) & (v < high)
    grad_x = torch.where(inside, grad, torch.zeros_like(grad))
    slope = torch.where(inside, torch.round(v) - v, torch.clamp(v, low, high))
    return grad_x, grad * slope


def _gradients_tensor(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients(grad, x, scale, low, high)


def _gradients_channel(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return _gradients(grad, x, scale, low, high)


def _clip_gradients_tensor(grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    v = _wide(x, scale) / scale
    inside = (v > low) & (v < high)
    zero = torch.zeros_like(grad)
    return torch.where(inside, grad, zero), torch.where(inside, zero, grad) * torch.clamp(v, low, high)


def _open_gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, residual: bool = True
) -> tuple[Tensor, Tensor]:
    r"""Return the gradient of ``x`` and the terms of the step size's, both differentiable with their true slopes.

    Both are linear in ``grad``. The terms' slope in ``v = x / scale`` is that of the sawtooth ``round(v) - v``, which
    is -1, or 0 where ``v`` is clipped; jumps are ignored. (``clamp`` would have a slope at its edges, where every zero
    after a ReLU is.)
    """
    x = _wide(x, scale)
    v = (x / scale).detach()
    inside = (v > low) & (v < high)
    zero = torch.zeros_like(v)
    nothing = torch.zeros_like(grad)
    # masked before the division, whose slope is x / scale**2: a huge clipped value must not turn it into 0 * inf
    sawtooth = torch.round(v) - torch.where(inside, x, zero) / scale if residual else zero
    return torch.where(inside, grad, nothing), grad * torch.where(inside, sawtooth, torch.clamp(v, low, high))


class _Fusion:
    """Compiles the functions above on first use; runs them unfused, with one warning, where that fails.

    The compiler creates a kernel for each setting that it depends on (threads, types, deterministic mode, ...), up to a
    limit. Settings beyond it run unfused; the others are not affected.
    """

    def __init__(self) -> None:
        self.enabled = os.environ.get("QKD_FUSED", "1") != "0"
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._unfused: set[Any] = set()
        self._has_warned = False
        self._native: NativeQuant | None = None
        self._asked = False

    def native(self, x: Tensor, *settings: Tensor) -> NativeQuant | None:
        """Return the C++ functions if they accept these tensors; None if the ones compiled here are next."""
        if not self.enabled or torch.compiler.is_compiling() or not NativeQuant.takes(x, *settings):
            return None
        if not self._asked:
            self._native, self._asked = load(), True
        return self._native

    def __call__(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        if not self.enabled or torch.compiler.is_compiling():
            return function(*tensors)
        # Detached: whether an operand requires a gradient, or is a view, must not create another kernel.
        tensors = tuple(tensor.detach() for tensor in tensors)
        key = (function, tensors[0].device.type)
        compiled = self._compiled.get(key)
        if compiled is None:
            return self._first(key, function, tensors)
        return self._later(key, compiled, function, tensors)

    def _first(self, key: Any, function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Any:
        try:
            _require_compiler(tensors[0].device)
            compiled = _compile(function, tensors[0].device)
            result = compiled(*tensors)
        except Exception as error:
            self.enabled = False
            self._warn("low-bit quantizers run unfused (slower, same results)", error)
            return function(*tensors)
        self._compiled[key] = compiled
        return result

    def _later(
        self, key: Any, compiled: Callable[..., Any], function: Callable[..., Any], tensors: tuple[Tensor, ...]
    ) -> Any:
        settings = (key, *_settings(tensors))
        if settings in self._unfused:
            return function(*tensors)
        try:
            return compiled(*tensors)
        except Exception as error:
            if not type(error).__module__.startswith(COMPILERS):
                raise
            self._unfused.add(settings)
            self._warn("low-bit quantizers run unfused under these settings (slower, same results)", error)
            return function(*tensors)

    def _warn(self, what: str, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        lines = str(error).strip().splitlines()
        _log.warning("%s: %s: %s", what, type(error).__name__, lines[0] if lines else "no message")


COMPILERS = ("torch._dynamo", "torch._inductor", "torch.fx")  # where the compiler's own errors are defined
# Triton's division is approximate by default; the name of the setting differs between torch versions
EXACT_DIVISION = ("eager_numerics.division_rounding", "emulate_division_rounding", "emulate_divison_rounding")


def _compile(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    if device.type == "cpu":
        return torch.compile(function, dynamic=True, fullgraph=True)
    from torch._inductor import config

    known = config.get_config_copy()  # type: ignore[no-untyped-call, unused-ignore]
    options: Any = {name: True for name in EXACT_DIVISION if name in known}
    return torch.compile(function, dynamic=True, fullgraph=True, options=options or None)


def _settings(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return the settings that kernels are recompiled for; calls that agree in these share one outcome."""
    return (
        tuple(tensor.dtype for tensor in tensors),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(tensors[0].device.type),
    )


def _require_compiler(device: torch.device) -> None:
    if device.type == "cpu" and cpp_compiler() is None:
        raise RuntimeError("no C++ compiler found; install g++ or clang++, or name one in CXX")


_fusion = _Fusion()


def compiled_for(x: Tensor) -> NativeQuant | None:
    """Return the C++ functions if they accept a tensor; None if PyTorch's operations give the same bits."""
    return _fusion.native(x)


def set_fused(*, enabled: bool) -> None:
    """Switch the compiled kernels on or off for this process (environment: ``QKD_FUSED=0``).

    Args:
        enabled: Whether kernels are compiled if possible.
    """
    _fusion.enabled = enabled


def is_fused() -> bool:
    """Return whether compiled kernels are in use.

    On a CPU, results do not depend on it, bit for bit.

    Returns:
        True until a compilation fails or they are switched off.
    """
    return _fusion.enabled


def _flat(x: Tensor) -> Tensor:
    """View a dense tensor of any memory format as one row, so that one kernel serves every shape.

    Within a larger compiled graph it stays unfused: the compiler chooses memory formats after tracing, and a view of
    the memory in traced strides would pair values with gradients from other positions.
    """
    if torch.compiler.is_compiling():
        return x
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.as_strided((x.numel(),), (1,))
    return x.contiguous().view(-1)


def _rows(x: Tensor) -> Tensor:
    """View dense weights as one row per output channel, with values in memory order; a copy if they are not dense."""
    if _is_last(x):
        values = x[0].numel()
        return x.as_strided((x.size(0), values), (values, 1))
    return x.reshape(x.size(0), -1)


def _like_rows(rows: Tensor, x: Tensor) -> Tensor:
    return rows.as_strided(x.size(), x.stride()) if _is_last(x) else rows.view(x.size())


def _is_last(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.dim() != 4 or len(x) == 0:
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _total(terms: Tensor, axis: int = -1) -> Tensor:
    """Return the sum of a step size's terms, on a CPU in the order of the C++."""
    if terms.device.type == "cpu" and not torch.compiler.is_compiling():
        return tree_sum(terms)
    return terms.sum(axis)


def _like(flat: Tensor, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return flat
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return flat.as_strided(x.size(), x.stride())
    return flat.view(x.size())


def _same_format(grad: Tensor, x: Tensor) -> Tensor:
    """Bring a gradient into the memory format of ``x``, so that flat views of both line up."""
    if torch.compiler.is_compiling() or grad.stride() == x.stride():
        return grad
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return grad.contiguous(memory_format=torch.channels_last)
    return grad.contiguous()


def _is_native_rows(x: Tensor) -> bool:
    return x.dtype is torch.float32  # weights are: reduced precision starts after them


# Each with one `forward(ctx, ...)`: a separate `setup_context` would cost more than the kernel of a small layer, as its
# arguments are bound by name at every call.
class _PerTensor(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: Tensor,
        high: Tensor,
        grad_scale: float,
        residual: bool,  # noqa: FBT001
    ) -> Tensor:
        ctx.grad_scale, ctx.residual = grad_scale, residual
        ctx.save_for_backward(x, scale, low, high)
        if (native := _fusion.native(x, scale, low, high)) is not None:
            return _like(native.quantize(_flat(x), scale, low, high), x)
        return _like(_fusion(_quantize_tensor, _flat(x), scale, low, high).to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grad_x, terms = _open_gradients(grad, x, scale, low, high, residual=ctx.residual)
            return grad_x, (terms.sum() * ctx.grad_scale).to(scale.dtype).view_as(scale), None, None, None, None
        flat_grad, flat_x = _flat(_same_format(grad, x)), _flat(x)
        if (native := _fusion.native(x, scale, low, high)) is not None:
            grad_x, total = native.gradients(flat_grad, flat_x, scale, low, high, residual=ctx.residual)
        else:
            function = _gradients_tensor if ctx.residual else _clip_gradients_tensor
            grad_x, terms = _fusion(function, flat_grad, flat_x, scale, low, high)
            total = _total(terms.flatten())
        return _like(grad_x, x), (total * ctx.grad_scale).to(scale.dtype).view_as(scale), None, None, None, None


class _PerChannel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, grad_scale: float) -> Tensor:
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(x, scale, low, high)
        rows = _rows(x)
        if _is_native_rows(x) and (native := _fusion.native(x, scale, low, high)) is not None:
            return _like_rows(native.quantize_rows(rows, scale, low, high), x)
        out: Tensor = _fusion(_quantize_channel, rows, scale.view(-1, 1), low, high)
        return _like_rows(out.to(x.dtype), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grad_x, terms = _open_gradients(grad, x, scale.view((-1,) + (1,) * (x.dim() - 1)), low, high)
            grad_s = terms.reshape(x.size(0), -1).sum(dim=1)
            return grad_x, (grad_s * ctx.grad_scale).to(scale.dtype).view_as(scale), None, None, None
        grad_rows, rows = _rows(_same_format(grad, x)), _rows(x)
        if _is_native_rows(x) and (native := _fusion.native(x, scale, low, high)) is not None:
            grad_x, totals = native.gradients_rows(grad_rows, rows, scale, low, high)
        else:
            grad_x, terms = _fusion(_gradients_channel, grad_rows, rows, scale.view(-1, 1), low, high)
            totals = _total(terms, 1)
        return _like_rows(grad_x, x), (totals * ctx.grad_scale).to(scale.dtype).view_as(scale), None, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, grad_scale: float = 1.0, residual: bool = True
) -> Tensor:
    r"""Return ``clip(round(x / scale), low, high) * scale`` with a straight-through gradient.

    With :math:`v = x / s`, the gradient of the output with respect to ``x`` is 1 for ``low < v < high`` and 0
    elsewhere; with respect to ``s`` it is :math:`\mathrm{round}(v) - v` inside, ``low`` or ``high`` outside, summed
    over the tensor and multiplied by ``grad_scale``. Rounding is half to even. These gradients can be differentiated
    again (``create_graph=True``): the second derivatives are those of the gradients as functions of ``x``, ``s`` and
    the gradient that arrives, between the points where they jump.

    Args:
        x: Values of any shape, floating.
        scale: One positive step size, shape ``[]``.
        low: Smallest code, shape ``[]``, floating, on the device of ``x``.
        high: Largest code, likewise.
        grad_scale: Factor on the gradient of ``scale``; LSQ uses :math:`1 / \sqrt{N Q_P}`.
        residual: Whether values inside the range contribute to the gradient of ``scale`` (LSQ: yes; PACT: no).

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If ``scale``, ``low`` or ``high`` is not a single value.

    References:
        Esser et al., `Learned Step Size Quantization <https://arxiv.org/abs/1902.08153>`_, 2020, equations 1 to 3;
        Choi et al., `PACT <https://arxiv.org/abs/1805.06085>`_, 2018, equations 1 to 3 (``residual=False``).
    """
    _check_counts(1, scale, low, high)
    return _PerTensor.apply(x, scale, low, high, grad_scale, residual)  # type: ignore[no-any-return]


def fake_quantize_per_channel(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, grad_scale: float) -> Tensor:
    """Return the same as :func:`fake_quantize`, with one step size for each index of the first dimension.

    Args:
        x: Weights, shape ``[out_channels, ...]``.
        scale: Positive step sizes, ``out_channels`` of them, shape ``[out_channels, 1, ...]``.
        low: Smallest code, shape ``[]``.
        high: Largest code, shape ``[]``.
        grad_scale: Factor on the gradients of ``scale``.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: If there is not one scale per output channel, or ``low`` or ``high`` is not a single value.
    """
    _check_counts(x.size(0), scale, low, high)
    return _PerChannel.apply(x, scale, low, high, grad_scale)  # type: ignore[no-any-return]


def _check_counts(scales: int, scale: Tensor, low: Tensor, high: Tensor) -> None:
    """Raise unless there are as many values as the compiled functions will read."""
    for name, given, count in (("scale", scale, scales), ("low", low, 1), ("high", high, 1)):
        if given.numel() != count:
            raise ValueError(f"{name} needs {count} values here, got {given.numel()} (shape {tuple(given.shape)})")


class _RoundStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def round_straight_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged."""
    return _RoundStraightThrough.apply(x)  # type: ignore[no-any-return]


def positive(scale: Tensor) -> Tensor:
    """Return ``abs(scale)``, at least ``TINY``; on a CPU, where the check is free, ``scale`` itself if it already is.

    The gradient is the same then, and this saves eight small operations per quantizer and step.
    """
    plain = (
        type(scale) in (Tensor, torch.nn.Parameter) and scale.device.type == "cpu" and not torch.compiler.is_compiling()
    )
    if plain and (scale if scale.numel() == 1 else scale.detach().min()).item() > TINY:
        return scale
    return scale.abs().clamp_min(TINY)
