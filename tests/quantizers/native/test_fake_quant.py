"""The C++ of fake quantization: the bits of PyTorch's own operations, whatever the type, size and number of threads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import quantizers
from quantizers import fake_quantize, fake_quantize_per_channel
from quantizers.native import building
from quantizers.native.fake_quant import NativeQuant, load, tree_sum
from quantizers.native.source import BLOCK, SOURCE

pytestmark = [
    pytest.mark.skipif(load() is None, reason="no C++ compiler at hand"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def scalar(value: float) -> Tensor:
    return torch.tensor(float(value))


def drawn(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 0.15, 0.45, -0.15, 1e-40, 3e38])
    values[: min(size, 10)] = special[: min(size, 10)]
    return values.to(dtype)


def results(x: Tensor, grad: Tensor, low: int, high: int, *, residual: bool) -> list[Tensor]:
    leaf, scale = x.clone().requires_grad_(), scalar(0.3).requires_grad_()
    out = fake_quantize(leaf, scale, scalar(low), scalar(high), grad_scale=0.1, residual=residual)
    out.backward(grad)
    assert leaf.grad is not None and scale.grad is not None
    return [out.detach(), leaf.grad, scale.grad]


def channel_results(x: Tensor, steps: Tensor, grad: Tensor) -> list[Tensor]:
    leaf, scale = x.clone().requires_grad_(), steps.clone().requires_grad_()
    out = fake_quantize_per_channel(leaf, scale, scalar(-2), scalar(1), grad_scale=0.5)
    out.backward(grad)
    assert leaf.grad is not None and scale.grad is not None
    return [out.detach(), leaf.grad, scale.grad]


def both(make: Callable[[], list[Tensor]]) -> None:
    """Compare with PyTorch's operations, bit for bit; NaN equals NaN."""
    found = make()
    quantizers.set_fused(enabled=False)
    expected = make()
    quantizers.set_fused(enabled=True)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
        assert torch.equal(torch.nan_to_num(one, 77.0), torch.nan_to_num(other, 77.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3, 100_000])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("skipped", [0, 10], ids=["special values", "finite"])
def test_bits_are_those_of_pytorch(dtype: torch.dtype, size: int, residual: bool, skipped: int) -> None:  # noqa: FBT001
    x, grad = drawn(size + skipped, dtype)[skipped:], drawn(size + 10, dtype, seed=1)[10:]
    for low, high in ((0, 3), (-128, 127)):
        both(functools.partial(results, x, grad, low, high, residual=residual))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bits_do_not_depend_on_threads(count: int) -> None:
    x, grad = drawn(300_000)[10:], drawn(300_000, seed=1)[10:]
    torch.set_num_threads(1)
    expected = results(x, grad, 0, 15, residual=True)
    torch.set_num_threads(count)
    assert all(torch.equal(*pair) for pair in zip(results(x, grad, 0, 15, residual=True), expected, strict=True))


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7), (3, 2048), (1, 1, 1, 1), (2, 300, 3, 3)])
@pytest.mark.parametrize("is_last", [False, True], ids=["contiguous", "channels last"])
def test_channels_too(shape: tuple[int, ...], is_last: bool) -> None:  # noqa: FBT001
    generator = torch.Generator().manual_seed(3)
    x, grad = torch.randn(2, *shape, generator=generator)
    if is_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    steps = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) + 0.1
    both(lambda: channel_results(x, steps, grad))


def test_the_sum_is_exact_enough_and_empty_sums_are_zero() -> None:
    terms = torch.randn(70_001, generator=torch.Generator().manual_seed(0))
    assert float(tree_sum(terms)) == pytest.approx(float(terms.double().sum()), abs=1e-4)
    assert float(tree_sum(torch.zeros(0))) == 0.0 and tree_sum(torch.ones(3, 0)).tolist() == [0.0] * 3
    assert tree_sum(torch.ones(2, 3 * BLOCK)).tolist() == [3 * BLOCK] * 2


def test_source_and_module_agree_on_blocks() -> None:
    assert f"BLOCK = {BLOCK};" in SOURCE


def test_what_it_does_not_take_runs_elsewhere() -> None:
    one = scalar(1)
    assert NativeQuant.takes(one, one, one, one)
    assert not NativeQuant.takes(one.double(), one, one, one) and not NativeQuant.takes(one, one.double(), one, one)
    assert not NativeQuant.takes(one.half(), one, one, one) and not NativeQuant.takes(one.to("meta"), one, one, one)


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QKD_NATIVE", "0")
    assert load() is None


def test_a_compiler_that_fails_is_told_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(building, "cpp_compiler", lambda: "/bin/false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level("INFO", logger=building.__name__):
        assert load() is None
    assert "was not compiled" in caplog.text
