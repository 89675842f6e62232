"""A network whose passes differ, whose forward changes parameters, or whose gradients have hooks is refused by name."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers import QuantSpec, RewriteError, Student, calibrate, prepare

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Operation = Callable[[Any, Tensor], Tensor]


class Body(nn.Module):
    """Layers around an operation under test, and a counter in Python."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.drop, self.operation, self.passes = nn.Dropout(0.5), operation, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, F.relu(self.conv(x))))


def _prepared(net: nn.Module) -> Student:
    return prepare(net, QuantSpec(weight_bits=8, act_bits=8), example_inputs=IMAGE)


def _warmed_up(m: Any, x: Tensor) -> Tensor:
    m.passes += m.training
    return x * 0.5 if m.training and m.passes > 1 else x


def _counted_after_use(m: Any, x: Tensor) -> Tensor:
    y = x * (1 + m.seen)
    if m.training:
        m.seen += 1
    return y


def _clamped(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.inner.weight.clamp_(-9, 9)
    return m.inner(x)


def _normalized(m: Any, x: Tensor) -> Tensor:
    m.inner.weight.data = F.normalize(m.inner.weight.data)
    return m.inner(x)


def _in_training(m: Any, x: Tensor) -> Tensor:
    if m.training:
        m.inner.weight.data.mul_(0.99)
    return m.inner(x)


def _replaced(m: Any, x: Tensor) -> Tensor:
    m.inner.weight = nn.Parameter(m.inner.weight.detach().clone())
    return m.inner(x)


WRITES = r"writes into the parameter `inner\.weight` at test_repeated\.py:\d+.*compute the weight from it"
REFUSED: dict[str, tuple[Operation, str]] = {
    "a counter in training": (_warmed_up, r"two passes in train\(\).*count and draw outside"),
    "a counter that is read first": (_counted_after_use, r"train\(\)"),
    "a generator made in forward": (
        lambda m, x: x * random.Random().uniform(0.5, 1) if m.training else x, r"train\(\)",
    ),
    "NumPy's made in forward": (
        lambda m, x: x * (0.5 + np.random.default_rng().random()) if m.training else x, r"train\(\)",
    ),
    "another function of one image": (lambda m, x: x * 2 if len(x) == 1 else x, "a single image.*every number of"),
    "weights clamped": (_clamped, WRITES),
    "weights normalized": (_normalized, WRITES),
    "weights decayed in training": (_in_training, WRITES),
    "a parameter replaced": (_replaced, r"replaces the parameter `inner\.weight`.*in __init__"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_passes_that_differ_are_refused_by_name(name: str) -> None:
    operation, message = REFUSED[name]
    with pytest.raises(RewriteError, match=message):
        _prepared(Body(operation))


def _counted(m: Any, x: Tensor) -> Tensor:
    m.passes += 1
    m.seen += 1
    return m.inner(m.drop(x))


TAKEN: dict[str, Operation] = {
    "counters that nothing reads": _counted,
    "dropout": lambda m, x: F.dropout(m.inner(m.drop(x)), 0.2, m.training),
    "one image alike": lambda m, x: m.inner(x) if len(x) > 1 else m.inner(x[0]).unsqueeze(0),
    "stochastic depth": lambda m, x: torchvision.ops.stochastic_depth(m.inner(x), 0.5, "row", m.training) + x,
}


@pytest.mark.parametrize("name", TAKEN)
def test_passes_that_agree_are_taken(name: str) -> None:
    _prepared(Body(TAKEN[name]))


def test_spectral_norm_may_go_on_estimating() -> None:
    net = Body(lambda m, x: m.inner(x))
    nn.utils.parametrizations.spectral_norm(net.inner)
    _prepared(net)


def test_stochastic_depth_that_is_on_in_eval_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"on in eval\(\)"):
        _prepared(Body(lambda m, x: torchvision.ops.stochastic_depth(m.inner(x), 0.5, "batch") + x))


HOOKS: dict[str, Callable[[nn.Conv2d], Any]] = {
    "full": lambda conv: conv.register_full_backward_hook(lambda _m, before, _after: before),
    "before": lambda conv: conv.register_full_backward_pre_hook(lambda _m, after: after),
    "of a parameter": lambda conv: conv.weight.register_hook(lambda gradient: gradient * 0.5),
    "accumulated": lambda conv: conv.weight.register_post_accumulate_grad_hook(lambda _p: None),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_on_gradients_are_refused_until_they_are_removed(name: str) -> None:
    net = Body(lambda m, x: m.inner(x))
    handle = HOOKS[name](net.inner)
    with pytest.raises(RewriteError, match=r"inner.*a hook on gradients.*remove it"):
        _prepared(net)
    handle.remove()
    _prepared(net)


def test_forward_hooks_are_part_of_the_function() -> None:
    net = Body(lambda m, x: m.inner(x))
    net.inner.register_forward_hook(lambda _m, _given, out: out * 0.5)
    net.inner.register_forward_pre_hook(lambda _m, given: (given[0] + 1,))
    net.register_forward_hook(lambda _m, _given, out: -out)
    student = _prepared(net)
    calibrate(student, IMAGE)
    with torch.no_grad():
        expected, found = net.eval()(IMAGE), student.eval()(IMAGE)
    assert float((found - expected).abs().mean()) < 0.06 * float(expected.std())


class Scores(NamedTuple):
    logits: Tensor
    features: Tensor


class Wrapped(OrderedDict):  # type: ignore[type-arg]
    """As libraries wrap what a model returns."""


class Heads(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.head, self.pack = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), pack

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.conv(x))
        return self.pack(self.head(y), y)


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], type]] = {
    "a named tuple": (Scores, tuple),
    "a dict of a custom type": (lambda a, b: Wrapped(logits=a, features=b), dict),
    "a list": (lambda a, b: [a, b], list),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_come_in_plain_structures(name: str) -> None:
    pack, kind = OUTPUTS[name]
    student = _prepared(Heads(pack))
    calibrate(student, IMAGE)
    result = student.eval()(IMAGE)
    shapes = [tuple(t.shape) for t in (result.values() if kind is dict else result)]
    assert isinstance(result, kind) and shapes == [(2, 2, 6, 6), (2, 8, 6, 6)]


def test_an_output_of_none_is_refused_before_training() -> None:
    with pytest.raises(RewriteError, match="holds None in eval.*return only tensors"):
        _prepared(Heads(lambda a, _b: (a, None)))


def test_images_by_keyword_only_are_refused_with_the_way_out() -> None:
    class Keyword(nn.Module):
        def forward(self, *, images: Tensor) -> Tensor:
            return images

    with pytest.raises(RewriteError, match=r"by keyword only \(images\).*wrap the network"):
        _prepared(Keyword())
