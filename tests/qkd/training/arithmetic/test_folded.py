"""A fixed net runs through folded convolutions with the same outputs, and itself wherever that is not the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qkd.config import TermConfig
from qkd.nets import build_net
from qkd.terms.step import DistillStep
from qkd.terms.weighting import build_terms
from qkd.testing import TinyNet
from qkd.training import Batch
from qkd.training.arithmetic.folded import FoldedNet, _Convolution
from quantizers import QuantSpec, calibrate, prepare


def images(channels: int = 3, count: int = 6) -> Tensor:
    return torch.randn(count, channels, 12, 12, generator=torch.Generator().manual_seed(0))


def moved(net: nn.Module) -> nn.Module:
    """Return a fixed net whose batch norms do something."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            assert module.running_var is not None
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.2)
    return net.eval().requires_grad_(False)


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return moved(build_net("resnet8", classes=5, channels=3, image_size=12))


def folded(net: FoldedNet) -> fx.GraphModule:
    assert net._folded is not None
    return net._folded


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_all_of_a_residual_net_is_folded_and_gives_the_same(layout: torch.memory_format) -> None:
    net, x = resnet(), images().contiguous(memory_format=layout)
    fast = FoldedNet(net)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
    assert fast._is_good == {torch.float32: True}
    kinds = [type(folded(fast).get_submodule(str(n.target))) for n in folded(fast).graph.nodes if n.op == "call_module"]
    assert kinds.count(_Convolution) == 9 and nn.BatchNorm2d not in kinds and nn.ReLU not in kinds
    assert not any("add" in node.name for node in folded(fast).graph.nodes if node.op == "call_function")
    assert not fast(x).requires_grad
    torch.testing.assert_close(fast(x[:2]), net(x[:2]), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_near_to_float32_as_the_net_itself() -> None:
    net, x = resnet(), images().contiguous(memory_format=torch.channels_last)
    fast, exact = FoldedNet(net), net(x)
    with torch.autocast("cpu", torch.bfloat16):
        own, found = net(x), fast(x)
    assert fast._is_good == {torch.bfloat16: True}
    assert (found - exact).abs().max() <= 2 * (own - exact).abs().max() + 0.01 * exact.abs().max()


def test_weights_that_are_written_to_are_followed() -> None:
    net, x = resnet(), images()
    fast = FoldedNet(net)
    fast(x)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.7)
    assert (net(x) - other(x)).abs().max() > 0.01
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
    fresh = FoldedNet(net)
    assert torch.equal(fresh(x), fast(x)), "a resumed training folds again"


class Branching(nn.Module):
    """Tells two kinds of images apart, which a recorded pass cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        return (out if out.sum() > 0 else -out).mean((2, 3))


class Awkward(nn.Module):
    """A convolution that is read twice, one used twice, a broadcast sum, a string as padding, an affine-free norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding="same")
        self.norm, self.bare = nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)
        self.small, self.shared = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        out = self.norm(first) + first  # the norm is not the only one who reads it
        out = functional.relu(self.bare(self.shared(out)))
        out = self.shared(out) + out
        out = torch.relu(self.again(out)) + self.small(out.mean((2, 3), keepdim=True))
        return out.flatten(1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_cannot_be_folded_stays(layout: torch.memory_format) -> None:
    net, x = moved(Awkward()), images().contiguous(memory_format=layout)
    fast = FoldedNet(net)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
    assert fast._is_good == {torch.float32: True}
    left = [type(folded(fast).get_submodule(str(n.target))) for n in folded(fast).graph.nodes if n.op == "call_module"]
    assert left.count(nn.BatchNorm2d) == 1 and left.count(nn.Conv2d) == 1 and left.count(_Convolution) == 4


def test_a_net_that_torch_fx_cannot_follow_runs_itself() -> None:
    net = moved(Branching())
    fast = FoldedNet(net)
    for x in (images(), -images()):
        assert torch.equal(fast(x), net(x))
    assert fast._folded is None


class Remembering(nn.Module):
    """Counts its passes: the pass that is recorded is not like the others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.passes = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.norm(self.conv(x)).mean((2, 3)) * self.passes


def test_a_net_with_a_memory_runs_itself() -> None:
    fast = FoldedNet(moved(Remembering()))
    first, second = fast(images()), fast(images())
    assert fast._is_good == {torch.float32: False}
    assert not torch.equal(first, second)


def counted(net: nn.Module) -> list[int]:
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_hooks_and_training_mode_see_the_net_itself() -> None:
    net, x = resnet(), images()
    fast = FoldedNet(net)
    fast(x)
    calls = counted(dict(net.named_modules())["layer1.0.conv1"])
    assert torch.equal(fast(x), net(x)) and len(calls) == 2
    other = resnet().train()
    before = {name: value.clone() for name, value in other.named_buffers()}
    FoldedNet(other)(x)
    assert any(not torch.equal(value, before[name]) for name, value in other.named_buffers()), "it ran in training mode"


def test_float64_is_folded_without_losing_bits() -> None:
    net, x = resnet().double(), images().double()
    fast = FoldedNet(net)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-10, atol=1e-10)


@pytest.fixture
def low_bit() -> Iterator[nn.Module]:
    torch.manual_seed(3)
    net = prepare(TinyNet(), QuantSpec(weight_bits=2, act_bits=2), example_inputs=torch.randn(2, 1, 16, 16))
    calibrate(net, [torch.randn(8, 1, 16, 16)])
    yield net.eval().requires_grad_(False)


def test_a_low_bit_teacher_gives_its_own_bits(low_bit: nn.Module) -> None:
    x = torch.randn(4, 1, 16, 16)
    assert torch.equal(FoldedNet(low_bit)(x), low_bit(x))


def test_the_distillation_step_asks_the_folded_teacher() -> None:
    torch.manual_seed(0)
    teacher, student = moved(TinyNet()), TinyNet().train()
    terms = build_terms([TermConfig(loss="soft_target")])
    step = DistillStep(student, teacher, terms)
    shown = torch.randn(4, 1, 16, 16)
    batch = Batch(shown, torch.zeros(4, dtype=torch.int64), shown.to(torch.uint8), 0, 0)
    first = step(batch)
    assert step._fast_teacher._is_good == {torch.float32: True}
    assert torch.isfinite(first.loss) and first.loss.requires_grad
