"""A network that is another function for larger batches is refused, whatever number its code asks about."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers import QuantSpec, RewriteError, Student, prepare
from quantizers.graph.proving.batches import require_same_of_more
from quantizers.graph.proving.counts import MOST_IMAGES, Size, SizesOfBatch
from quantizers.graph.proving.repeated import _in_float64, largest_difference, require_same_in_eval

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Operation = Callable[[Any, Tensor], Tensor]


class Body(nn.Module):
    """Layers around an operation under test."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.operation = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, F.relu(self.conv(x))))


def _prepared(operation: Operation) -> Student:
    return prepare(Body(operation), QuantSpec(weight_bits=8, act_bits=8), example_inputs=IMAGE)


def _rounded_up(_m: Any, x: Tensor) -> Tensor:
    groups = -(-x.shape[0] // 16)
    return x if groups == 1 else x * groups


def _one_piece(m: Any, x: Tensor) -> Tensor:
    pieces = x.split(4)
    return m.inner(pieces[0]) if len(pieces) > 1 else pieces[0] * 2


def _in_training_only(m: Any, x: Tensor) -> Tensor:
    return x * 2 if m.training and x.size(0) > 8 else x


OTHERS: dict[str, tuple[Operation, str]] = {
    "larger than": (lambda m, x: x * 2 if x.size(0) > 4 else x, "for 5 images than for 3"),
    "at least": (lambda m, x: x * 2 if x.shape[0] >= 9 else x, "for 9 images"),
    "just one number": (lambda m, x: x * 2 if x.shape[0] == 11 else x, "for 11 images"),
    "one of several": (lambda m, x: x * 2 if x.size(dim=0) in (16, 32) else x, "for 16 images"),
    "a multiple": (lambda m, x: x * 2 if x.shape[0] % 8 == 0 else x, "for 8 images"),
    "a quotient": (lambda m, x: x * (1 + x.shape[0] // 8), "for 8 images"),
    "a number of values": (lambda m, x: x * 2 if x.numel() > 1000 else x, "for 7 images"),
    "the larger": (lambda m, x: x * max(x.size(0), 6), "for 7 images"),
    "len": (lambda m, x: x * 2 if len(x) > 4 else x, "for 8 images"),
    "a root": (lambda m, x: x * int(1 + math.sqrt(x.size(0)) / 2.5), "for 8 images"),
    "a product of NumPy": (lambda m, x: x * 2 if np.prod(x.shape) > 4000 else x, "for 33 images"),
    "a tensor of sizes": (lambda m, x: x * (1 + (torch.tensor(x.shape)[0] > 9)), "for 33 images"),
    "a loop": (lambda m, x: x * (1 + len(range(0, x.size(0), 8))), "for 33 images"),
    "bytes": (lambda m, x: x * 2 if x.nbytes > 9000 else x, "for 16 images"),
    "many bytes": (lambda m, x: x * 2 if x.nbytes > 60_000 else x, "for 105 images"),
    "len of many": (lambda m, x: x * 2 if len(x) > 64 else x, "for 65 images"),
    "just one len": (lambda m, x: x * 2 if len(x) == 128 else x, "for 128 images"),
    "a range": (lambda m, x: x * 2 if sum(1 for _ in range(len(x))) > 200 else x, "for 256 images"),
    "a set": (lambda m, x: x * 2 if x.size(0) in {64, 100} else x, "for 64 images"),
    "a dictionary": (lambda m, x: x * {256: 2}.get(x.shape[0], 1), "for 256 images"),
    "ones": (lambda m, x: x * torch.ones(x.size(0)).sum().clamp(min=6), "for 8 images"),
    "rounded up": (_rounded_up, "for 17 images"),
    "in train() only": (_in_training_only, r"in train\(\) for 9 images"),
    "a shorter output": (lambda m, x: x.narrow(0, 0, min(6, x.size(0))), r"for 7 images.*shape \(6, 2, 6, 6\)"),
    "the first images": (lambda m, x: x[:4], "picks images of the batch"),
    "the first images, by slice": (lambda m, x: x[slice(0, 4)], "picks images of the batch"),
    "one piece for now": (_one_piece, "picks images of the batch"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_function_of_more_images_is_refused(name: str) -> None:
    operation, message = OTHERS[name]
    with pytest.raises(RewriteError, match=message):
        _prepared(operation)


def _bounded(_m: Any, x: Tensor) -> Tensor:
    assert 0 < x.size(0) < 10_000_000
    assert x.size(0) <= 4, "small batches, please"
    return x


def _by_chunks(m: Any, x: Tensor) -> Tensor:
    return torch.cat([F.relu(part) for part in x.split(4)]) if x.size(0) > 4 else F.relu(x)


def _by_sizes(_m: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.size()
    assert x.shape == (b, 4, 6, 6) and x.shape == x.clone().shape
    return x.reshape(b, c * h * w).view(-1, c, h, w)[:b] + x.new_zeros(b, 1, 1, 1)


SAME: dict[str, Operation] = {
    "bounds": _bounded, "chunks": _by_chunks, "sizes": _by_sizes, "all": lambda m, x: x[:],
    "one chunk": lambda m, x: x.chunk(1)[0], "all of them": lambda m, x: x.narrow(0, 0, x.size(0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_who_asks_and_stays_the_same_is_welcome(name: str) -> None:
    student = _prepared(SAME[name])
    assert isinstance(student, Student)


def test_more_images_than_can_be_tried_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantizers.graph.proving.batches.MOST_VALUES", 3 * 8 * 8 * 100)
    with pytest.raises(RewriteError, match="in train.., it checks whether there are about 127 images.*verify=False"):
        _prepared(lambda m, x: x * 2 if x.size(0) > 128 else x)


@pytest.mark.parametrize(
    ("ask", "tried"),
    [
        (lambda n: n > 4, [3, 4, 5]),
        (lambda n: n + n == 9, [3, 4, 5, 6]),
        (lambda n: 3 * n - 1 < 20, [6, 7, 8]),
        (lambda n: n * 768 > 4000, [4, 5, 6, 7]),
        (lambda n: n == n and n + 1 > n, []),
        (lambda n: n > MOST_IMAGES + 1, []),
        (lambda n: n > float("inf"), []),
        (lambda n: n * 2.5, []),
    ],
)
def test_what_is_tried_follows_from_what_is_asked(ask: Callable[[Any], Any], tried: list[int]) -> None:
    sizes = SizesOfBatch(2)
    ask(Size(2, 1.0, sizes))
    assert sizes.candidates == tried


@pytest.mark.parametrize("number", [-3, 0, 1, 2, 7, 2.5])
def test_a_size_computes_like_a_number(number: float) -> None:
    size = Size(2, 1.0, SizesOfBatch(2))
    for name in ("add", "sub", "mul", "eq", "ne", "lt", "le", "gt", "ge", "truediv", "floordiv", "mod"):
        for plain, followed in ((number, size), (size, number)):
            function = getattr(__import__("operator"), name)
            try:
                expected = function(*(2 if value is size else value for value in (plain, followed)))
            except ZeroDivisionError:
                with pytest.raises(ZeroDivisionError):
                    function(plain, followed)
                continue
            assert function(plain, followed) == expected
    assert {size: 1}[2] == 1 and -size == -2 and range(size) == range(2) and f"{size}" == "2"


def test_a_size_that_somebody_keeps_is_copied_and_pickled_as_a_number() -> None:
    size = Size(2, 1.0, SizesOfBatch(2))
    for kept in (copy.copy(size), copy.deepcopy([size])[0]):
        assert type(kept) is int and kept == 2
    assert b"Size" not in pickle.dumps(size)


def test_rounding_of_large_values_is_no_difference() -> None:
    large = torch.tensor([1.3e8, 5.0])
    assert largest_difference([large], [large + torch.tensor([0.0, 24.0])]) is None
    assert largest_difference([large], [large + torch.tensor([0.0, 2e4])]) == 2e4
    assert largest_difference([torch.tensor([math.inf, 5.0])], [torch.tensor([math.inf, 6.0])]) == 1.0
    assert largest_difference([torch.tensor([0.5])], [torch.tensor([0.5 + 1e-2])]) == pytest.approx(1e-2)


class Reordered(nn.Module):
    """Sums in another order for more images, and amplifies the rounding: 1e-7 becomes about 1.

    Args:
        lost: Channels that a larger batch leaves out of the sum.
    """

    def __init__(self, lost: int = 0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight, self.lost, self.dtype = nn.Parameter(torch.tensor(1e6)), lost, dtype

    def forward(self, x: Tensor) -> Tensor:
        few, x = len(x) < 3, x if self.dtype is None else x.to(self.dtype)
        x = x if few else x.flip(1)[:, self.lost :]
        total = x[:, :1]
        for channel in range(1, x.size(1)):
            total = total + x[:, channel : channel + 1]
        return torch.sin(total * self.weight)


MANY_CHANNELS = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
def test_amplified_rounding_is_no_difference(training: bool) -> None:
    net = Reordered().train(training)
    with torch.no_grad():
        few, more = net(MANY_CHANNELS), net(MANY_CHANNELS.repeat(2, 1, 1, 1))[:2]
    assert float((few - more).abs().max()) > 0.1
    require_same_of_more(net, MANY_CHANNELS)
    require_same_in_eval(net, MANY_CHANNELS.repeat(2, 1, 1, 1), net(MANY_CHANNELS.repeat(2, 1, 1, 1)))
    assert net.weight.dtype is torch.float32 and net.weight.item() == 1e6


def test_amplified_rounding_hides_no_other_function() -> None:
    net = Reordered(lost=1)
    with pytest.raises(RewriteError, match="images than for 2 of them"):
        require_same_of_more(net, MANY_CHANNELS)
    with pytest.raises(RewriteError, match="for a single image"):
        four = MANY_CHANNELS.repeat(2, 1, 1, 1)
        require_same_in_eval(net, four, net.eval()(four))


def test_without_float64_a_difference_counts() -> None:
    """A network that computes in float32 whatever it gets cannot show that rounding is all that differs."""
    with pytest.raises(RewriteError, match="images than for 2 of them"):
        require_same_of_more(Reordered(dtype=torch.float32), MANY_CHANNELS)


def test_float64_is_for_the_block_alone() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net[0].half()
    before = {name: (one, one.data_ptr()) for name, one in net.state_dict(keep_vars=True).items()}
    with _in_float64(net):
        assert {one.dtype for one in net.parameters()} == {torch.float64}
        net[1].running_mean += 1
        assert net[1].num_batches_tracked.dtype is torch.int64
    after = net.state_dict(keep_vars=True)
    assert all(after[name] is one and one.data_ptr() == place for name, (one, place) in before.items())
    assert net[0].weight.dtype is torch.float16 and not net[1].running_mean.any()
