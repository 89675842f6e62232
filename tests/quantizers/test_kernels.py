"""Fake quantization: worked numbers, the published gradients, memory formats, fused against eager."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import quantizers
from quantizers import fake_quantize, fake_quantize_per_channel, set_fused


def scalar(value: float) -> Tensor:
    return torch.tensor(float(value))


def run(
    x: Tensor,
    step: float,
    low: int,
    high: int,
    *,
    grad: Tensor | None = None,
    grad_scale: float = 1.0,
    residual: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, gradient of x, gradient of the step."""
    x, scale = x.detach().requires_grad_(), scalar(step).requires_grad_()
    out = fake_quantize(x, scale, scalar(low), scalar(high), grad_scale=grad_scale, residual=residual)
    out.backward(torch.ones_like(out) if grad is None else grad)
    assert x.grad is not None and scale.grad is not None
    return out.detach(), x.grad, scale.grad


def test_worked_numbers() -> None:
    # step 0.5, 2 bits unsigned: v = x / s = -1, 0.4, 1.5 (tie: to even), 2.5 (tie), 2.6, 8
    x = torch.tensor([-0.5, 0.2, 0.75, 1.25, 1.3, 4.0])
    out, grad_x, grad_s = run(x, 0.5, 0, 3)
    assert out.tolist() == [0.0, 0.0, 1.0, 1.0, 1.5, 1.5]
    assert grad_x.tolist() == [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    # 0 (below) + (0 - 0.4) + (2 - 1.5) + (2 - 2.5) + (3 - 2.6) + 3 (above)
    assert float(grad_s) == pytest.approx(3.0, abs=1e-6)


def test_identity_on_the_grid_and_limits() -> None:
    codes = torch.arange(-8.0, 8.0)
    out, _, grad_s = run(codes * 0.25, 0.25, -8, 7)
    assert torch.equal(out, codes * 0.25)
    assert float(grad_s) == -8 + 7  # inside: round(v) - v = 0; the ends count as clipped
    out, grad_x, _ = run(torch.tensor([math.inf, -math.inf, 1e30, -1e30]), 0.25, -8, 7)
    assert out.tolist() == [1.75, -2.0, 1.75, -2.0] and grad_x.tolist() == [0.0] * 4


def published(x: Tensor, step: float, low: int, high: int, grad: Tensor) -> tuple[list[float], float]:
    """Esser et al., equations 2 and 3, in Python floats."""
    grad_x, grad_s = [], 0.0
    for value, g in zip(x.flatten().tolist(), grad.flatten().tolist(), strict=True):
        v = value / step
        grad_x.append(g if low < v < high else 0.0)
        grad_s += g * (round(v) - v if low < v < high else (low if v <= low else high))
    return grad_x, grad_s


@pytest.mark.parametrize(("low", "high"), [(0, 3), (-2, 1), (0, 15), (-8, 7), (-128, 127), (-3, 12)])
def test_gradients_follow_the_published_formula(low: int, high: int) -> None:
    generator = torch.Generator().manual_seed(high)
    x = torch.randn(3, 4, 5, generator=generator) * high * 0.1
    grad = torch.randn(3, 4, 5, generator=generator)
    _, grad_x, grad_s = run(x, 0.11, low, high, grad=grad)
    expected_x, expected_s = published(x, 0.11, low, high, grad)
    assert grad_x.flatten().tolist() == expected_x
    assert float(grad_s) == pytest.approx(expected_s, rel=1e-4, abs=1e-4)


def test_gradient_scale_multiplies_the_step_only() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    _, grad_x, grad_s = run(x, 0.3, 0, 3)
    _, scaled_x, scaled_s = run(x, 0.3, 0, 3, grad_scale=0.125)
    assert torch.equal(grad_x, scaled_x)
    assert float(scaled_s) == pytest.approx(0.125 * float(grad_s))


def test_without_residual_only_clipped_values_move_the_step() -> None:
    x = torch.tensor([-1.0, 0.2, 0.74, 1.2, 9.0, 7.0])
    _, grad_x, grad_s = run(x, 0.5, 0, 3, residual=False)
    assert float(grad_s) == 6.0  # two values above, times Q_P; those below hit code 0
    assert grad_x.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    _, _, grad_s = run(torch.tensor([0.2, 0.7]), 0.5, 0, 3, residual=False)
    assert float(grad_s) == 0.0


def test_per_channel_equals_channel_by_channel() -> None:
    generator = torch.Generator().manual_seed(3)
    x, grad = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(4, 3, 2, 2, generator=generator)
    steps = torch.tensor([0.1, 0.2, 0.5, 1.0]).reshape(4, 1, 1, 1)
    leaf, scale = x.clone().requires_grad_(), steps.clone().requires_grad_()
    out = fake_quantize_per_channel(leaf, scale, scalar(-2), scalar(1), grad_scale=0.5)
    out.backward(grad)
    assert leaf.grad is not None and scale.grad is not None and scale.grad.shape == steps.shape
    for channel in range(4):
        one, one_x, one_s = run(x[channel], float(steps[channel]), -2, 1, grad=grad[channel], grad_scale=0.5)
        assert torch.equal(out[channel], one)
        assert torch.equal(leaf.grad[channel], one_x)
        torch.testing.assert_close(scale.grad[channel].reshape(()), one_s)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "strided": lambda x: x[:, ::2],
    "sliced": lambda x: x[1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "pixels": lambda x: x[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
    "rank 2": lambda x: x.flatten(1).t(),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("grad_name", ["dense", "channels_last", "broadcast"])
def test_memory_formats_change_nothing(name: str, grad_name: str) -> None:
    base = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    x = FORMATS[name](base)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    if grad_name == "channels_last" and x.dim() == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    if grad_name == "broadcast":
        grad = torch.tensor(0.5).expand(x.shape)
    plain = torch.empty(x.shape).copy_(x)
    expected = run(plain, 0.3, 0, 15, grad=grad.contiguous())
    got = run(x, 0.3, 0, 15, grad=grad)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    out, grad_x, grad_s = run(torch.tensor([0.1, 0.6, 9.0], dtype=dtype), 0.5, 0, 3)
    assert (out.dtype, grad_x.dtype, grad_s.dtype) == (dtype, dtype, torch.float32)
    assert out.tolist() == [0.0, 0.5, 1.5]


def test_nan_in_nan_out() -> None:
    x = torch.tensor([0.3, math.nan, 5.0])
    out, grad_x, grad_s = run(x, 0.5, 0, 3)
    assert torch.isnan(out).tolist() == [False, True, False]
    assert torch.isnan(grad_s)
    rows = torch.tensor([[0.3, math.nan], [1.0, 1.0]])
    out = fake_quantize_per_channel(rows, torch.ones(2, 1), scalar(-2), scalar(1), grad_scale=1.0)
    assert torch.isnan(out).tolist() == [[False, True], [False, False]]


def test_empty_tensor() -> None:
    out, grad_x, grad_s = run(torch.zeros(0, 3), 0.5, 0, 3)
    assert out.shape == grad_x.shape == (0, 3) and float(grad_s) == 0.0


def test_fused_equals_eager() -> None:
    """One test, few shapes: compilation costs seconds. Values and gradients bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 5, 5, generator=generator)
    x[0, 0, 0, 0] = math.nan
    clean, large = torch.randn(4, 6, 5, 5, generator=generator), torch.randn(40_000, generator=generator)
    weights, steps = torch.randn(6, 4, 3, 3, generator=generator), torch.rand(6, 1, 1, 1, generator=generator) + 0.1

    def everything() -> list[Tensor]:
        results = [fake_quantize(x, scalar(0.3), scalar(0), scalar(3))]
        for tensor in (clean, clean.contiguous(memory_format=torch.channels_last), clean[1:, :, 1:]):
            results += run(tensor, 0.3, 0, 3, grad_scale=0.1)
        for residual in (True, False):
            results += run(large, 0.0173, -128, 127, grad=large.flip(0), residual=residual)
        results += run(large.bfloat16(), 0.3, 0, 15, grad=large.flip(0).bfloat16())
        leaf, scale = weights.clone().requires_grad_(), steps.clone().requires_grad_()
        out = fake_quantize_per_channel(leaf, scale, scalar(-2), scalar(1), grad_scale=0.5)
        out.backward(weights)
        assert leaf.grad is not None and scale.grad is not None
        return [*results, out.detach(), leaf.grad, scale.grad]

    eager = everything()
    quantizers.set_fused(enabled=True)
    fused = everything()
    if not quantizers.is_fused():
        pytest.skip("no compiler at hand: the eager path is the only one")
    for a, b in zip(eager, fused, strict=True):
        assert torch.equal(torch.nan_to_num(a, 77.0), torch.nan_to_num(b, 77.0))


def test_settings_beyond_the_compilers_limit_run_unfused_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every thread count, type and mode is another kernel; dynamo makes eight of a function, here two."""
    from quantizers import kernels

    fusion = kernels._Fusion()
    fusion.enabled = fusion._asked = True  # as where the C++ was not compiled: PyTorch's compiler is meant here
    monkeypatch.setattr(kernels, "_fusion", fusion)
    # a separate function: what other tests compiled counts for the limit, too
    source = kernels._quantize_tensor
    own = type(source)(source.__code__.replace(co_name="own"), source.__globals__, "own")
    monkeypatch.setattr(kernels, "_quantize_tensor", own)
    x = torch.randn(64, generator=torch.Generator().manual_seed(4))
    wanted = torch.clamp(torch.round(x / scalar(0.3)), 0, 3) * scalar(0.3)

    def forward(value: Tensor) -> Tensor:
        return fake_quantize(value, scalar(0.3), scalar(0), scalar(3))

    with torch._dynamo.config.patch(recompile_limit=2):
        assert torch.equal(forward(x), wanted)
        if not quantizers.is_fused():
            pytest.skip("no compiler at hand: the eager path is the only one")
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float64, torch.bfloat16):
            given = x.to(dtype)
            expected = (torch.clamp(torch.round(given.to(torch.promote_types(dtype, torch.float32)) / 0.3), 0, 3)).sum()
            assert float((forward(given) / 0.3).round().sum()) == pytest.approx(float(expected), abs=1e-3)
        for _ in range(2):
            torch.use_deterministic_algorithms(True)
            try:
                assert torch.equal(forward(x), wanted)
            finally:
                torch.use_deterministic_algorithms(False)
        assert torch.equal(forward(x), wanted)  # what had a kernel still has it
    warnings = [record.getMessage() for record in caplog.records if record.name == kernels.__name__]
    assert len(warnings) == 1 and "unfused under these settings (slower, same results)" in warnings[0]
    assert quantizers.is_fused() and fusion._unfused


def test_errors_of_the_callers_own_are_not_swallowed() -> None:
    from quantizers import kernels

    fusion = kernels._Fusion()
    fusion.enabled = True

    def fails(*tensors: Tensor) -> Tensor:
        raise MemoryError("no memory left")

    function = kernels._quantize_tensor
    fusion._compiled[function, "cpu"] = fails
    with pytest.raises(MemoryError):
        fusion(function, torch.zeros(2), scalar(1), scalar(0), scalar(3))


def test_falls_back_once_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from quantizers import kernels

    fusion = kernels._Fusion()
    fusion.enabled = True
    monkeypatch.setattr(kernels, "_fusion", fusion)
    monkeypatch.setattr("shutil.which", lambda _name: None)
    x = torch.tensor([0.2, 0.9])
    for _ in range(3):
        assert run(x, 0.5, 0, 3)[0].tolist() == [0.0, 1.0]
    assert not quantizers.is_fused()
    warnings = [record for record in caplog.records if record.name == kernels.__name__]
    assert len(warnings) == 1 and "g++" in warnings[0].getMessage()


@pytest.mark.slow
def test_a_compiled_layer_has_the_gradients_of_the_eager_one() -> None:
    """The compiler lays convolutions out again after tracing: views by traced strides would mispair values."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(8, 8, 3, padding=1, bias=False).double(), torch.nn.BatchNorm2d(8).double()
    x, weights = torch.randn(2, 4, 8, 6, 6, dtype=torch.double)
    low, high = torch.zeros((), dtype=torch.double), torch.full((), 3.0, dtype=torch.double)

    def layer(images: Tensor, step: Tensor) -> Tensor:
        return (fake_quantize(norm(conv(images)), step.abs(), low, high, grad_scale=0.1) * weights).sum()

    def gradients(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        images, step = x.clone().requires_grad_(), torch.full((), 0.3, dtype=torch.double).requires_grad_()
        function(images, step).backward()
        assert images.grad is not None and step.grad is not None
        return images.grad, step.grad

    for found, expected in zip(gradients(torch.compile(layer, dynamic=False)), gradients(layer), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("enabled", [True, False])
def test_scales_that_do_not_fit_are_refused(enabled: bool) -> None:
    """The compiled functions would read what is behind them."""
    x, low, high = torch.linspace(-1, 1, 8).reshape(8, 1, 1, 1), torch.tensor(-2.0), torch.tensor(1.0)
    set_fused(enabled=enabled)
    try:
        for count in (1, 3, 9):
            with pytest.raises(ValueError, match=rf"scale needs 8 values here, got {count}"):
                fake_quantize_per_channel(x, torch.full((count, 1, 1, 1), 0.5), low, high, grad_scale=1.0)
        with pytest.raises(ValueError, match="scale needs 1 values here, got 8"):
            fake_quantize(x, torch.full((8, 1, 1, 1), 0.5), low, high)
        with pytest.raises(ValueError, match="low needs 1 values here, got 2"):
            fake_quantize(x, torch.tensor(0.5), torch.zeros(2), high)
    finally:
        set_fused(enabled=True)
