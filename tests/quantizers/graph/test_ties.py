"""Two weights computed from one parameter are refused by name, and so is what a student would not train or draw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers import QuantSpec, RewriteError, Student, prepare

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Body(nn.Module):
    """Layers and a learned tensor around an operation under test."""

    def __init__(self, operation: Callable[[Body, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.base, self.gain = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.tensor(0.7))
        self.long, self.offset = nn.Parameter(torch.randn(16, 8, 1, 1)), nn.Parameter(torch.randn(8))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, F.relu(self.conv(x))))


def _prepared(operation: Callable[[Body, Tensor], Tensor]) -> Student:
    return prepare(Body(operation), QuantSpec(weight_bits=8, act_bits=8), example_inputs=IMAGE)


def _two(m: Body, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.conv2d(F.relu(F.conv2d(x, first)), second)


TIED: dict[str, tuple[Callable[[Body, Tensor], Tensor], str]] = {
    "two of one": (
        lambda m, x: _two(m, x, m.base * 0.5, m.base.transpose(0, 1)), r"conv2d\.weight and conv2d_1\.weight.*`base`",
    ),
    "one gain of two": (lambda m, x: _two(m, x, m.base * m.gain, m.inner.weight * m.gain), "weight.*weight.*`gain`"),
    "parts that overlap": (lambda m, x: _two(m, x, m.long[:8], m.long[7:15]), "weight.*weight.*`long`"),
    "two offsets": (
        lambda m, x: F.conv2d(F.conv2d(x, m.base, m.offset * 2), m.inner.weight, m.offset + 1), "bias.*bias.*`offset`",
    ),
    "one offset used directly": (
        lambda m, x: F.conv2d(F.conv2d(x, m.base, m.offset), m.inner.weight, m.offset), r"bias are one .*`offset`",
    ),
    "computed slopes": (
        lambda m, x: F.prelu(m.inner(F.prelu(x, m.offset.abs())), m.offset * 2), "weight.*weight.*`offset`",
    ),
    "weight and offset of one layer": (
        lambda m, x: F.conv2d(x, m.base * m.gain, m.offset * m.gain), r"conv2d\.weight and conv2d\.bias.*`gain`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIED)
def test_weights_of_one_parameter_are_refused_by_name(name: str) -> None:
    operation, message = TIED[name]
    with pytest.raises(RewriteError, match=message) as caught:
        _prepared(operation)
    caught.match(r"its own parameter|requires_grad_\(False\)")


SOUND: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "parts that do not overlap": lambda m, x: _two(m, x, m.long[:8], m.long[8:]),
    "one PReLU twice": lambda m, x: F.prelu(m.inner(F.prelu(x, m.offset)), m.offset),
    "a learned mix": lambda m, x: m.gain * x + (1 - m.gain) * m.inner(x),
    "one computed weight": lambda m, x: F.conv2d(x, F.normalize(m.base), m.offset),
}


@pytest.mark.filterwarnings("ignore:the network computes")
@pytest.mark.parametrize("name", SOUND)
def test_what_belongs_to_one_layer_or_stays_one_parameter_is_taken(name: str) -> None:
    _prepared(SOUND[name])


def test_a_frozen_parameter_may_be_behind_many_weights() -> None:
    net = Body(TIED["two of one"][0])
    net.base.requires_grad_(False)
    student = prepare(net, QuantSpec(), example_inputs=IMAGE)
    assert not student.get_submodule("conv2d").weight.requires_grad


def test_layers_that_hold_one_weight_are_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    net[4].weight = net[2].weight
    with pytest.raises(RewriteError, match=r"2\.weight and 4\.weight are one parameter, `2\.weight`"):
        prepare(net, QuantSpec(), example_inputs=IMAGE)


def test_the_slopes_of_one_prelu_stay_one() -> None:
    student = _prepared(SOUND["one PReLU twice"])
    assert len({id(m.weight) for m in student.modules() if isinstance(m, nn.PReLU)}) == 1


def test_both_factors_of_a_learned_lerp_train() -> None:
    student = _prepared(lambda m, x: torch.lerp(x, m.inner(x), m.gain))
    assert all(p.requires_grad for p in student.parameters() if p.ndim > 1)


RANDOM: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "noise on a weight in training": lambda m, x: F.conv2d(
        x, m.base + 0.1 * torch.randn_like(m.base) if m.training else m.base
    ),
    "dropped weights": lambda m, x: F.conv2d(x, F.dropout(m.base, 0.3, m.training)),
    "a dropped offset": lambda m, x: F.conv2d(x, m.base, F.dropout(m.offset, 0.3, m.training)),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("verify", [True, False])
def test_random_weights_are_refused_with_their_place(name: str, verify: bool) -> None:
    with pytest.raises(RewriteError, match=r"conv2d \(test_ties\.py:\d+\).*random numbers; use a dropout layer"):
        prepare(Body(RANDOM[name]), QuantSpec(), example_inputs=IMAGE, verify=verify)


BOUNDS: dict[str, Callable[[Body, Tensor], Tensor]] = {
    "clamp": lambda m, x: torch.clamp(x, max=m.gain),
    "minimum": lambda m, x: torch.minimum(m.inner(x), m.gain),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_learned_bound_is_refused_and_a_frozen_one_taken(name: str) -> None:
    net = Body(BOUNDS[name])
    with pytest.raises(RewriteError, match=r"bound is learned; use a constant.*requires_grad_\(False\)"):
        prepare(net, QuantSpec(), example_inputs=IMAGE)
    net.gain.requires_grad_(False)
    prepare(net, QuantSpec(), example_inputs=IMAGE)
