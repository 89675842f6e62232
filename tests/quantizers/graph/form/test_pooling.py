"""Pooling with plain windows equals PyTorch's own, adaptive and functional forms included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers import QuantSpec, prepare
from quantizers.graph.form.pooling import adaptive_pool
from quantizers.graph.trace import RewriteError, trace
from quantizers.layers import GlobalAveragePool

IMAGE = torch.randn(2, 3, 11, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "target"),
    [
     ((7, 7), (1, 1)), ((6, 6), (6, 6)), ((6, 6), (3, 2)), ((2, 2), (6, 6)),
     ((7, 5), (3, 2)), ((13, 13), (6, 6)), ((1, 1), (7, 7)), ((3, 8), (6, 4))],
)  # fmt: skip
def test_adaptive_pooling(size: tuple[int, int], target: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    gather, pool, count = adaptive_pool(size, target)
    y = x if gather is None else gather(x)
    y = y if pool is None else pool(y)
    torch.testing.assert_close(y, F.adaptive_avg_pool2d(x, target))
    assert (count == 1) == (pool is None)


def module_of(operation: Callable[[Tensor], Tensor] | nn.Module) -> nn.Module:
    """Return the canonical module that an operation on images is spelled with."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = operation if isinstance(operation, nn.Module) else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x) if isinstance(operation, nn.Module) else operation(x)

    traced = trace(Wrapped(), IMAGE)
    modules = [traced.module(node) for node in traced.graph.nodes if node.op == "call_module"]
    assert len(modules) == 1 and modules[0] is not None
    return modules[0]


POOLS: dict[str, Any] = {
    "max": nn.MaxPool2d(3, 2, padding=1),
    "max ceil dilated": nn.MaxPool2d(2, 3, dilation=2, ceil_mode=True),
    "max default stride": nn.MaxPool2d((2, 3)),
    "average": nn.AvgPool2d(3, 2, padding=1),
    "average without padding": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False, ceil_mode=True),
    "functional max": lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True),
    "functional positional": lambda x: F.max_pool2d(x, (3, 2), (2, 1), 1),
    "functional average": lambda x: F.avg_pool2d(x, kernel_size=3, padding=1, count_include_pad=False),
    "window of the size": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "window of one size": lambda x: F.max_pool2d(x, x.size(3)),
    "one-sided mean": lambda x: x.mean(3, keepdim=True),
    "maximum": lambda x: x.amax((2, 3), keepdim=True),
    "maximum of rows": lambda x: x.max(2, keepdim=True)[0],
    "adaptive maximum": nn.AdaptiveMaxPool2d(1),
}


@pytest.mark.parametrize("name", POOLS)
def test_windows_are_kept(name: str) -> None:
    module = module_of(POOLS[name])
    assert isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)) and isinstance(module.kernel_size, tuple)
    torch.testing.assert_close(module(IMAGE), POOLS[name](IMAGE))


@pytest.mark.parametrize(
    "mean", [lambda x: x.mean([2, 3]), lambda x: torch.mean(x, (-1, -2), keepdim=True), lambda x: x.mean(dim=(3, 2))]
)
def test_spatial_mean(mean: Callable[[Tensor], Tensor]) -> None:
    module = module_of(mean)
    assert isinstance(module, GlobalAveragePool)
    torch.testing.assert_close(module(IMAGE), mean(IMAGE))


@pytest.mark.parametrize("mean", [lambda x: x.mean(0), lambda x: x.mean(), lambda x: x.mean((0, 2, 3))])
def test_means_over_the_batch_are_refused(mean: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RewriteError, match=r"mean .*has no low-bit form: it mixes or picks images of the batch"):
        module_of(mean)


def test_override_of_the_divisor_at_an_overhang_is_refused() -> None:
    with pytest.raises(RewriteError, match="pool: ceil_mode with another divisor has no integer kernel"):
        module_of(nn.AvgPool2d(2, ceil_mode=True, divisor_override=3))


def test_another_divisor_is_a_factor_on_the_mean() -> None:
    """``prepare`` compares the spelling with torch; what is left here is that it takes it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2, 1, divisor_override=2), nn.Conv2d(4, 2, 1))
    prepare(net, QuantSpec(), example_inputs=torch.randn(2, 3, 8, 8))
