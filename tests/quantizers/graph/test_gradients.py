"""A student trains with the gradients of its float net: stops are kept, anything else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from quantizers import QuantSpec, RewriteError, Student, prepare
from quantizers.graph.form.canonical import StopGradient
from quantizers.layers import ActQuantizer, QuantConvBn2d

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Swish(torch.autograd.Function):
    """Saves memory; its backward is the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradient * (gate * (1 + x * (1 - gate)))


class Body(nn.Module):
    """Layers around an operation under test."""

    def __init__(self, operation: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.bn, self.operation = nn.BatchNorm2d(8), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, F.relu(self.conv(x))))


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(m.inner(x))
    return x + y


@torch.no_grad()
def _gate(m: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(m.inner(x).mean((2, 3), keepdim=True))


def _switched(m: Any, x: Tensor) -> Tensor:
    torch.set_grad_enabled(False)
    y = m.inner(x)
    torch.set_grad_enabled(True)
    return x + y


def _through_a_view(m: Any, x: Tensor) -> Tensor:
    flat = x.detach().flatten(1)
    return m.inner(x + flat.view(x.shape))


def _straight_through(m: Any, x: Tensor) -> Tensor:
    y = m.inner(x)
    return y + (torch.tanh(y) - y).detach()


STOPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "detach of the operand": lambda m, x: x + m.inner(x.detach()),
    "detach of the branch": lambda m, x: x + m.inner(x).detach(),
    "detach_": lambda m, x: x + m.inner((x * 1.5).detach_()),
    "data": lambda m, x: x + m.inner(x.data),
    "straight through": _straight_through,
    "no_grad": _without_gradient,
    "no_grad as decorator": lambda m, x: x * _gate(m, x),
    "set_grad_enabled": _switched,
    "in train() only": lambda m, x: x + m.inner(x.detach() if m.training else x),
    "view of it": _through_a_view,
    "inside a checkpoint": lambda m, x: checkpoint(lambda y: m.inner(y) + y.detach(), x, use_reentrant=True),
}


def _prepared(operation: Callable[[Any, Tensor], Tensor]) -> Student:
    return prepare(Body(operation), QuantSpec(weight_bits=8, act_bits=8), example_inputs=IMAGE)


def _gradient(net: nn.Module) -> Tensor:
    net.train()
    net.zero_grad()
    net(IMAGE).sum().backward()
    found = net.get_submodule("conv").weight.grad
    assert isinstance(found, Tensor)
    return found


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("name", STOPS)
def test_a_stop_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With quantizers bypassed, the first layer's gradient is the float net's."""
    student = _prepared(STOPS[name])
    assert sum(isinstance(module, StopGradient) for module in student.modules()) == 1
    monkeypatch.setattr(ActQuantizer, "forward", lambda self, x: self.quant.in_float(x))
    monkeypatch.setattr(QuantConvBn2d, "forward", lambda self, x: self._conv_forward(x, self.weight, self.bias))
    expected, found = _gradient(Body(STOPS[name])), _gradient(student)
    assert float((found - expected).norm()) < 1e-4 * float(expected.norm())


def _doubled_by_a_hook(m: Any, x: Tensor) -> Tensor:
    y = m.inner(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 2)
    return y


def _written_without_gradient(m: Any, x: Tensor) -> Tensor:
    y = m.inner(x)
    with torch.no_grad():
        y.mul_(2)
    return y


def _written_through_data(m: Any, x: Tensor) -> Tensor:
    y = m.inner(x)
    y.data.mul_(2)
    return y


def _inference(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = m.inner(x)
    return x + y.clone()


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "reversal": (lambda m, x: m.inner(Reversal.apply(x)), r"Reversal, .*at test_gradients\.py:\d+"),
    "hook": (_doubled_by_a_hook, r"a hook on a gradient at test_gradients\.py:\d+"),
    "in place under no_grad": (_written_without_gradient, r"in place without a gradient at test_gradients\.py:\d+"),
    "in place through data": (_written_through_data, r"in place without a gradient at test_gradients\.py:\d+"),
    "weight also detached": (
        lambda m, x: m.inner(x) + F.conv2d(x, m.inner.weight.detach()), r"that of `inner\.weight`|inner.*detached",
    ),
    "weight also transposed": (
        lambda m, x: F.conv2d(F.relu(m.inner(x)), m.inner.weight.transpose(0, 1)),
        r"inner\.weight and conv2d\.weight are computed from one parameter",
    ),
    "inference mode": (_inference, r"inner: runs under torch\.inference_mode\(\) at test_gradients\.py:\d+.*use"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_gradients_are_refused_by_name(name: str) -> None:
    operation, message = REFUSED[name]
    with pytest.raises(RewriteError, match=message):
        _prepared(operation)


def _watched(m: Any, x: Tensor) -> Tensor:
    y = m.inner(x)
    if m.training:
        y.register_hook(lambda gradient: None)
        y.retain_grad()
    return y


SAME: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a backward that is the derivative": lambda m, x: m.inner(Swish.apply(x)),
    "a hook that only looks": _watched,
    "a reentrant checkpoint": lambda m, x: checkpoint(lambda y: F.relu(m.bn(m.inner(y))), x, use_reentrant=True),
    "a checkpoint with drop-out": lambda m, x: checkpoint(
        lambda y: F.dropout(m.bn(m.inner(y)), 0.3, m.training), x, use_reentrant=False
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("name", SAME)
def test_what_has_the_same_gradient_is_taken(name: str) -> None:
    assert not any(isinstance(module, StopGradient) for module in _prepared(SAME[name]).modules())
