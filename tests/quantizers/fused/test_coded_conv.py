"""Convolutions from codes: exact sums, the gradients of the convolution of values, and only where codes are known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import quantizers
from quantizers import QuantSpec, calibrate, prepare
from quantizers.fused import coded_conv
from quantizers.kernels import compiled_for
from quantizers.layers import QuantConvBn2d
from quantizers.student import Student

LAST = torch.channels_last
pytestmark = [
    pytest.mark.skipif(not coded_conv._has_kernels(torch.float32), reason="no 8-bit kernels at hand"),
    pytest.mark.usefixtures("compiled_kernels"),
]


def drawn(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 0)}])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_largest_codes_are_summed_exactly(options: dict[str, object], bits: int) -> None:
    """All codes at their ends: what 16 bits for two products, or 24 bits of a float, would have to round."""
    torch.manual_seed(0)
    conv = nn.Conv2d(33, 7, 3, bias=False, **options)  # type: ignore[arg-type]
    top = 2**bits - 1
    for codes, weights in (
        (torch.full((2, 33, 9, 8), float(top)), torch.full((7, 33, 3, 3), float(-(2 ** (bits - 1))))),
        (torch.full((2, 33, 9, 8), float(top)), torch.full((7, 33, 3, 3), float(2 ** (bits - 1)))),
        (drawn(0, top, 2, 33, 9, 8), drawn(-(2 ** (bits - 1)), 2 ** (bits - 1), 7, 33, 3, 3, seed=1)),
    ):
        steps, step = torch.rand(7, 1, 1, 1) + 0.1, torch.tensor(0.3137)
        x = (codes * step).contiguous(memory_format=LAST)
        assert coded_conv.takes(x, conv)
        found = coded_conv.coded_conv(x, weights * steps, step, steps, conv, compiled_for)
        sums = functional.conv2d(codes.double(), weights.double(), None, conv.stride, conv.padding, conv.dilation)
        exact = sums * step.double() * steps.double().view(1, -1, 1, 1)
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
        assert found.is_contiguous(memory_format=LAST)


def test_compiled_or_not_the_codes_are_the_same() -> None:
    step = torch.tensor(0.0137)
    for dtype in (torch.float32, torch.bfloat16):
        x = (drawn(0, 15, 2, 40, 30, 30) * step).to(dtype).contiguous(memory_format=LAST)
        found = []
        for enabled in (True, False):
            quantizers.set_fused(enabled=enabled)
            found.append(coded_conv._codes(x, step, compiled_for(x)))
        assert found[0] is not None and found[1] is not None
        assert torch.equal(*found) and torch.equal(found[0].float(), drawn(0, 15, 2, 40, 30, 30))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["first", "last", "weight"])
def test_a_value_that_is_not_a_number_has_no_code(enabled: bool, dtype: torch.dtype, where: str) -> None:
    """As code 0 it would vanish: training would continue as if nothing had happened."""
    quantizers.set_fused(enabled=enabled)
    conv, step, steps = nn.Conv2d(40, 5, 3, bias=False), torch.tensor(0.5), torch.full((5, 1, 1, 1), 0.25)
    x = (drawn(0, 15, 2, 40, 60, 60) * step).to(dtype).contiguous(memory_format=LAST)
    weight = drawn(-2, 1, 5, 40, 3, 3) * steps
    if where == "weight":
        weight[3, 0, 1, 1] = float("nan")
    else:
        place = 0 if where == "first" else -1
        x[place, place, place, place] = float("nan")
    found = coded_conv.coded_conv(x, weight, step, steps, conv, compiled_for)
    wanted = functional.conv2d(x, weight.to(dtype))
    assert found.dtype is dtype and bool(found.isnan().any())
    assert torch.equal(found.isnan(), wanted.isnan())


def test_gradients_are_those_of_the_values_also_when_differentiated_again() -> None:
    conv, step, steps = (
        nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
        torch.tensor(0.5),
        torch.full((5, 1, 1, 1), 0.25),
    )
    x, weight = (drawn(0, 3, 2, 4, 7, 7) * step).contiguous(memory_format=LAST), drawn(-2, 1, 5, 4, 3, 3) * steps
    found = []
    for own in (True, False):
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_(), weight.clone().requires_grad_()]
        out = (
            coded_conv.coded_conv(*leaves, step, steps, conv, compiled_for) if own
            else functional.conv2d(*leaves, None, conv.stride, conv.padding)
        )  # fmt: skip
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(one.square().sum() for one in first), leaves)
        found.append([*first, *second])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-3)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Return what sets whether the processor has AMX tiles."""

    def set_to(there: bool) -> None:
        coded_conv._has_kernels.cache_clear()
        monkeypatch.setattr(coded_conv, "has_tiles", lambda: there)

    yield set_to
    coded_conv._has_kernels.cache_clear()


def test_codes_are_not_multiplied_in_bfloat16_where_tiles_multiply_it(tiles: Callable[[bool], None]) -> None:
    tiles(True)
    assert not coded_conv._has_kernels(torch.bfloat16) and coded_conv._has_kernels(torch.float32)
    tiles(False)
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert coded_conv._has_kernels(torch.bfloat16) == is_wide and coded_conv._has_kernels(torch.float32)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="bfloat16 is emulated here")
def test_in_bfloat16_it_is_nearer_to_exact_than_a_convolution_of_rounded_values(
    tiles: Callable[[bool], None],
) -> None:
    tiles(False)
    conv, step, steps = nn.Conv2d(16, 8, 3, padding=1, bias=False), torch.tensor(0.3137), torch.rand(8, 1, 1, 1) + 0.1
    codes, weight = drawn(0, 15, 4, 16, 8, 8), drawn(-8, 7, 8, 16, 3, 3) * steps
    x = (codes * step).bfloat16().contiguous(memory_format=LAST)
    exact = functional.conv2d(codes * step, weight, None, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert coded_conv.takes(x, conv)
        found, own = (
            coded_conv.coded_conv(x, weight, step, steps, conv, compiled_for),
            functional.conv2d(x, weight, None, 1, 1),
        )
    assert found.dtype is torch.bfloat16
    assert (found.float() - exact).norm() < 0.8 * (own.float() - exact).norm()


def student(bits: int = 2) -> tuple[Student, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(6, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, bias=False),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    nn.init.normal_(net[8].weight)  # channels that are turned round, too
    images = torch.randn(6, 3, 10, 10).contiguous(memory_format=LAST)
    made = prepare(net, QuantSpec(weight_bits=bits, act_bits=bits), images[:2])
    calibrate(made, [images])
    return made.train().to(memory_format=LAST), images


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of each layer that multiplies codes."""
    names: list[str] = []
    own = coded_conv.coded_conv

    def watch(x: Tensor, weight: Tensor, x_step: Tensor, weight_step: Tensor, conv: QuantConvBn2d, how: Any) -> Tensor:
        names.append(conv.name)
        return own(x, weight, x_step, weight_step, conv, how)

    monkeypatch.setattr(coded_conv, "coded_conv", watch)
    return names


def gradients(net: Student, images: Tensor) -> list[Tensor]:
    torch.manual_seed(5)  # drop-out
    net(images).square().sum().backward()
    return [one.grad for one in net.parameters() if one.grad is not None]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_student_learns_the_same_from_codes(bits: int, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net, images = student(bits)
    found = gradients(net, images)
    assert len(asked) == 1, "not the first layer, which reads eight bits; not the second, for drop-out is before it"
    plain, _ = student(bits)
    monkeypatch.setattr(coded_conv, "takes", lambda *_: False)
    for mine, its in zip(found, gradients(plain, images), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-3)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "change", ["eval", "contiguous", "bypass", "own bypass", "finer", "eight bits", "hook", "sawb weights"]
)
def test_without_known_codes_values_are_multiplied(change: str, asked: list[str]) -> None:
    net, images = student(8 if change == "eight bits" else 2)
    third = [one for one in net.modules() if isinstance(one, QuantConvBn2d)][2]
    before = third._before[0]
    if change == "eval":
        net.eval()
    elif change == "contiguous":
        net, images = net.to(memory_format=torch.contiguous_format), images.contiguous()
    elif change == "bypass":
        before.quant.bypass = True
    elif change == "own bypass":
        third.quant.bypass = True
    elif change == "finer":
        before.quant.finer = 2
    elif change == "hook":
        before.register_forward_hook(lambda _module, _inputs, out: out * 0.5)
    elif change == "sawb weights":
        third.quant.__class__ = type("Other", (type(third.quant),), {})
    net(images)
    assert asked == []


def test_a_copy_reads_from_its_own_quantizer(asked: list[str]) -> None:
    net, images = student()
    twin = copy.deepcopy(net)
    twin(images)
    assert len(asked) == 1
    pairs = [[one._before for one in made.modules() if isinstance(one, QuantConvBn2d)] for made in (net, twin)]
    assert all(mine != its for mine, its in zip(*pairs, strict=True) if mine)
