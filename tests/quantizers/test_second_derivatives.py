"""Second derivatives of fake quantization: the first gradients stay, and differentiate in turn."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import quantizers
from quantizers import fake_quantize, fake_quantize_per_channel
from quantizers.computed import DorefaWeightQuant
from quantizers.tensor_quant import LsqActQuant, LsqWeightQuant, PactActQuant

STEP = 0.3
RANGES = [(0, 3), (-2, 1), (-8, 7)]


def scalar(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def values(*shape: int, low: int, high: int) -> Tensor:
    """Return values inside and outside of a range, none near a point where a first gradient jumps."""
    generator = torch.Generator().manual_seed(low + 10 * high)
    codes = torch.randint(low - 2, high + 3, shape, generator=generator).double()
    # at least 0.1 from the codes (where a range ends) and from the middles (where rounding turns)
    offsets = 0.1 + 0.3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return (codes + offsets) * STEP


def gradients(function: Callable[..., Tensor], *inputs: Tensor, graph: bool) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return (out.detach(), *(grad.detach() for grad in torch.autograd.grad(out, leaves, upstream, create_graph=graph)))


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("residual", [True, False])
def test_finite_differences_of_the_first_gradients_per_tensor(low: int, high: int, residual: bool) -> None:
    x = values(3, 4, low=low, high=high).requires_grad_()

    def function(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize(x, scale, scalar(low), scalar(high), grad_scale=0.7, residual=residual)

    assert torch.autograd.gradgradcheck(function, (x, scalar(STEP).requires_grad_()))


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_finite_differences_of_the_first_gradients_per_channel(low: int, high: int) -> None:
    x = (values(3, 2, 2, 2, low=low, high=high) * torch.tensor([1.0, 0.5, 2.0]).view(3, 1, 1, 1)).requires_grad_()
    scale = (STEP * torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)).view(3, 1, 1, 1).requires_grad_()

    def function(x: Tensor, scale: Tensor) -> Tensor:
        return fake_quantize_per_channel(x, scale, scalar(low), scalar(high), grad_scale=0.7)

    assert torch.autograd.gradgradcheck(function, (x, scale))


def test_worked_numbers() -> None:
    # s = 0.5, codes 0 ... 3: v = -1 (below), 0.4, 2.6, 8 (above); L = sum(w * q) with w = 1, 2, 3, 4
    x = torch.tensor([-0.5, 0.2, 1.3, 4.0], dtype=torch.float64, requires_grad=True)
    scale, weights = scalar(0.5).requires_grad_(), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    loss = (weights * fake_quantize(x, scale, scalar(0), scalar(3))).sum()
    grad_x, grad_s = torch.autograd.grad(loss, (x, scale), create_graph=True)
    assert grad_x.tolist() == [0.0, 2.0, 3.0, 0.0]
    assert grad_s.item() == pytest.approx(1 * 0 + 2 * (0 - 0.4) + 3 * (3 - 2.6) + 4 * 3)
    by_x, by_s = torch.autograd.grad(grad_s, (x, scale))
    assert by_x.tolist() == pytest.approx([0.0, -2 / 0.5, -3 / 0.5, 0.0])  # round(x/s) - x/s falls by 1/s
    assert float(by_s) == pytest.approx((2 * 0.2 + 3 * 1.3) / 0.5**2)  # and rises by x/s**2


def test_values_at_the_edges_have_no_slope() -> None:
    """Every zero behind a ReLU is on the lower edge, where ``clamp`` would claim a slope."""
    x = torch.tensor([0.0, 1.5, 0.0], dtype=torch.float64, requires_grad=True)
    scale = scalar(0.5).requires_grad_()
    _, grad_s = torch.autograd.grad(
        fake_quantize(x, scale, scalar(0), scalar(3)).sum(), (x, scale), create_graph=True
    )  # fmt: skip
    assert grad_s.requires_grad
    assert torch.autograd.grad(grad_s, x)[0].tolist() == [0.0, 0.0, 0.0]


def test_the_surrogate_of_a_curved_loss() -> None:
    r"""Through :math:`q^3` the straight-through estimate of the second derivative is :math:`6 q` inside, 0 outside.

    Finite differences would say 0: between jumps the first gradient :math:`3 q^2` is constant.
    """
    x = values(20, low=-2, high=1).requires_grad_()
    quantized = fake_quantize(x, scalar(STEP), scalar(-2), scalar(1))
    (first,) = torch.autograd.grad((quantized**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    v = x.detach() / STEP
    inside = (v > -2) & (v < 1)
    assert bool(inside.any()) and bool((~inside).any())
    torch.testing.assert_close(second, torch.where(inside, 6 * quantized.detach(), 0.0))


@pytest.mark.parametrize("x", [torch.zeros(6), torch.full((6,), 0.3), torch.full((6,), 1e4), torch.eye(6)[2]])
@pytest.mark.parametrize("scale", [0.3, 1e-10])
def test_extreme_values_stay_finite(x: Tensor, scale: float) -> None:
    x, step = x.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)
    out = fake_quantize(x, step, torch.tensor(0.0), torch.tensor(3.0))
    first = torch.autograd.grad((out**2).sum(), (x, step), create_graph=True)
    second = torch.autograd.grad(sum((grad**2).sum() for grad in first), (x, step))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*first, *second))


class _Plain(nn.Module):
    """A quantizer's dequantized output alone, in float64 but for its codes."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.quantizer(x)[0]
        return out


def _weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).double() * 0.2


def _calibrated(quantizer: LsqActQuant | PactActQuant) -> LsqActQuant | PactActQuant:
    quantizer.mark_calibrated()
    quantizer.set_step(STEP)
    return quantizer


QUANTIZERS: dict[str, Callable[[], nn.Module]] = {
    "lsq weights per channel": lambda: LsqWeightQuant(2, -2, 1, _weight(3, 4), per_channel=True),
    "lsq weights per tensor": lambda: LsqWeightQuant(4, -8, 7, _weight(3, 4), per_channel=False),
    "dorefa weights": lambda: DorefaWeightQuant(2, -2, 1, _weight(3, 4), has_norm=True),
    "dorefa weights, own gain": lambda: DorefaWeightQuant(2, -2, 1, _weight(3, 4), has_norm=False),
    "lsq activations": lambda: _calibrated(LsqActQuant(2, "unsigned")),
    "lsq signed activations": lambda: _calibrated(LsqActQuant(4, "signed")),
    "pact activations": lambda: _calibrated(PactActQuant(2, "unsigned")),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantizer_modules_with_their_scales(name: str) -> None:
    quantizer = _Plain(QUANTIZERS[name]())
    scales = {key: value.detach().clone() for key, value in quantizer.named_parameters()}
    x = values(3, 4, low=0, high=3) if "activations" in name else _weight(3, 4)

    def function(x: Tensor, *steps: Tensor) -> Tensor:
        state = dict(zip(scales, steps, strict=True))
        return torch.func.functional_call(quantizer, state, (x,))  # type: ignore[no-any-return]

    leaves = [x.requires_grad_(), *(scale.requires_grad_() for scale in scales.values())]
    assert bool(scales) != name.startswith("dorefa")
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-4)


def everything(*, graph: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 5, 5, generator=generator)
    weights, steps = torch.randn(6, 4, 3, 3, generator=generator), torch.rand(6, 1, 1, 1, generator=generator) + 0.1
    results: list[Tensor] = []
    for residual in (True, False):
        for tensor in (x, x.contiguous(memory_format=torch.channels_last), x[1:, :, 1:]):

            def act(x: Tensor, step: Tensor, residual: bool = residual) -> Tensor:
                return fake_quantize(x, step, torch.tensor(0.0), torch.tensor(3.0), grad_scale=0.1, residual=residual)

            results += gradients(act, tensor, torch.tensor(STEP), graph=graph)

    def weight(x: Tensor, steps: Tensor) -> Tensor:
        return fake_quantize_per_channel(x, steps, torch.tensor(-2.0), torch.tensor(1.0), grad_scale=0.5)

    return [*results, *gradients(weight, weights, steps, graph=graph)]


@pytest.mark.parametrize("fused", [False, True])
def test_values_and_first_gradients_are_those_of_the_plain_path(fused: bool) -> None:
    """Values and gradients of ``x`` bit for bit; those of step sizes up to the order of a sum."""
    before = quantizers.is_fused()
    quantizers.set_fused(enabled=fused)
    try:
        plain, opened = everything(graph=False), everything(graph=True)
    finally:
        quantizers.set_fused(enabled=before)
    for a, b in zip(plain, opened, strict=True):
        is_exact = a.dim() == 4 and a.shape[1:] != (1, 1, 1)
        if is_exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nan_stays_nan() -> None:
    x = torch.tensor([0.3, math.nan], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    out = fake_quantize(x, scale, torch.tensor(0.0), torch.tensor(3.0))
    _, grad_s = torch.autograd.grad(out.sum(), (x, scale), create_graph=True)
    assert math.isnan(grad_s.item())
