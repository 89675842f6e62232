"""Every spelling that people use is one function: the canonical graph computes it, and the student."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import quantizers
from quantizers import QuantSpec, RewriteError, calibrate, prepare
from quantizers.graph import rewrite
from quantizers.graph.spelling import table
from quantizers.graph.trace import trace

IMAGE = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Operation = Callable[[Any, Tensor], Tensor]


class Body(nn.Module):
    """A convolution, an operation under test, and a classifier over all that it gives."""

    def __init__(self, operation: Operation, **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 8, 3, padding=1)
        self.gamma = nn.Parameter(0.5 + torch.rand(8, 1, 1))
        self.register_buffer("offset", torch.randn(8, 1, 1))
        for name, part in parts.items():
            setattr(self, name, copy.deepcopy(part))
        self.operation = operation
        nn.init.normal_(self.norm.bias)
        self.eval()
        with torch.no_grad():
            shape = self.operation(self, self.norm(self.conv(IMAGE.clone()))).shape
        self.out = nn.Linear(shape[1:].numel(), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.operation(self, self.norm(self.conv(x))).flatten(1))


def relu_in_place(m: Any, x: Tensor) -> Tensor:
    skip = x
    return m.side(F.relu(x, inplace=True)) + skip


def module_in_place(m: Any, x: Tensor) -> Tensor:
    skip = x
    return m.side(m.act(x)) + skip


def add_in_place(m: Any, x: Tensor) -> Tensor:
    skip = x
    x += m.side(x)
    return F.relu(x) + skip


def through_a_view(m: Any, x: Tensor) -> Tensor:
    view = x.flatten(2)
    F.relu_(view)
    return m.side(x) + view.view_as(x)


def slice_in_place(m: Any, x: Tensor) -> Tensor:
    x[:, 2:5] *= 2
    x[:, ::3].relu_()
    x[:, 7] = x[:, 0]
    return m.side(x)


def into_zeros(m: Any, x: Tensor) -> Tensor:
    wide = torch.zeros(x.size(0), 12, *x.shape[2:])
    wide[:, 2:10] = x
    return wide


def mul_in_place_by_a_gate(m: Any, x: Tensor) -> Tensor:
    twin = x.view(x.shape)
    x.mul_(torch.sigmoid(m.side(x)))
    return twin


def option_a(m: Any, x: Tensor) -> Tensor:
    return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2), "constant", 0)


def excite(m: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(m.fc(F.avg_pool2d(x, x.size()[2:]).view(x.size(0), -1)))
    return x * gate.view(x.size(0), -1, 1, 1).expand_as(x)


def asserted(m: Any, x: Tensor) -> Tensor:
    assert x.dim() == 4 and x.shape[1] == 8
    return m.side(x) if x.size(1) == 8 else x


CASES: dict[str, tuple[Operation, dict[str, Any]]] = {
    "relu in place": (relu_in_place, {}),
    "module in place": (module_in_place, {"act": nn.ReLU(inplace=True)}),
    "add in place": (add_in_place, {}),
    "through a view": (through_a_view, {}),
    "slice": (slice_in_place, {}),
    "into zeros": (into_zeros, {}),
    "gate in place": (mul_in_place_by_a_gate, {}),
    "one act twice": (lambda m, x: m.side(m.act(x)) + m.act(m.act(x)), {"act": nn.SiLU()}),
    "shared slopes": (lambda m, x: m.act(m.side(m.act(x))), {"act": nn.PReLU(8)}),
    "y + y": (lambda m, x: x + x, {}),
    "y * y": (lambda m, x: x * x, {}),
    "cat y y": (lambda m, x: torch.cat([x, x], 1), {}),
    "scaled branch": (lambda m, x: x + 0.2 * m.side(x), {}),
    "half sum": (lambda m, x: (x + m.side(x)) / 2, {}),
    "layer scale": (lambda m, x: x + m.gamma * m.side(x), {}),
    "alpha": (lambda m, x: torch.add(x, m.side(x), alpha=2), {}),
    "difference": (lambda m, x: x - m.side(x), {}),
    "negative": (lambda m, x: -F.relu(x), {}),
    "one minus gate": (lambda m, x: x * (1 - torch.sigmoid(m.side(x))), {}),
    "rsub": (lambda m, x: torch.rsub(x, 1.5), {}),
    "normalized": (lambda m, x: (x - m.offset) / m.gamma, {}),
    "sum of a list": (lambda m, x: sum([x, m.side(x), x]), {}),
    "keyword": (lambda m, x: torch.add(x, other=m.side(x)), {}),
    "positions": (lambda m, x: x + torch.ones(1, 8, 8, 8).cumsum(3), {}),
    "lerp": (lambda m, x: torch.lerp(x, m.side(x), 0.3), {}),
    "cube": (lambda m, x: x**3, {}),
    "expand_as": (excite, {"fc": nn.Linear(8, 8)}),
    "pad": (lambda m, x: F.pad(x, (1, 2, 0, 1)), {}),
    "crop": (lambda m, x: F.pad(x, (-1, 0, 0, -2)), {}),
    "zero pad": (lambda m, x: m.side(m.pad(x)), {"pad": nn.ZeroPad2d((0, 1, 0, 1))}),
    "option a": (option_a, {}),
    "same": (lambda m, x: m.odd(x), {"odd": nn.Conv2d(8, 8, (2, 3), padding="same")}),
    "slices": (lambda m, x: x[:, 1:7:2, :, ::2], {}),
    "narrow": (lambda m, x: x.narrow(1, 2, 3), {}),
    "select": (lambda m, x: torch.stack([x[:, 1], x[:, -1]], 1), {}),
    "flip": (lambda m, x: x.flip(1, 3), {}),
    "roll": (lambda m, x: torch.roll(x, (1, -2), (2, 3)), {}),
    "indices": (lambda m, x: x[:, [3, 0, 0]], {}),
    "stack sum": (lambda m, x: torch.stack([x, m.side(x)]).sum(0), {}),
    "stack mean": (lambda m, x: torch.stack([x, m.side(x)], 1).mean(1), {}),
    "chunk": (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), {}),
    "split": (lambda m, x: torch.cat([F.relu(x.split([3, 5], 1)[0]), x.split([3, 5], 1)[1]], 1), {}),
    "unbind": (lambda m, x: torch.stack(x.unbind(1)[:3], 1), {}),
    "squeeze": (lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(), {}),
    "movedim": (lambda m, x: x.movedim(1, -1).permute(dims=(0, 3, 1, 2)), {}),
    "repeat": (lambda m, x: x.repeat(1, 2, 1, 1), {}),
    "mean twice": (lambda m, x: x.mean(-1).mean(-1), {}),
    "spatial sum": (lambda m, x: x.sum((2, 3)), {}),
    "channel mean": (lambda m, x: x * x.mean(1, keepdim=True), {}),
    "channel maximum": (lambda m, x: x * torch.max(x, 1, keepdim=True)[0], {}),
    "adaptive maximum": (lambda m, x: F.adaptive_max_pool2d(x, (3, 2)), {}),
    "pool 1d": (lambda m, x: F.avg_pool1d(x.flatten(2), 4), {}),
    "linear 4d": (lambda m, x: m.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), {"fc": nn.Linear(8, 5)}),
    "linear norm 3d": (lambda m, x: m.bn(m.fc(x.flatten(2))), {"fc": nn.Linear(64, 64), "bn": nn.BatchNorm1d(8)}),
    "norm behind relu": (
        lambda m, x: m.bn(F.relu(m.fc(x.mean((2, 3))))),
        {"fc": nn.Linear(8, 6), "bn": nn.BatchNorm1d(6)},
    ),
    "sync norm": (lambda m, x: m.bn(m.side(x)), {"bn": nn.SyncBatchNorm(8)}),
    "matmul": (lambda m, x: x @ torch.linspace(-1, 1, 24).reshape(8, 3), {}),
    "conv1d": (lambda m, x: m.odd(x.flatten(2)), {"odd": nn.Conv1d(8, 4, 3, stride=2, padding=1)}),
    "functional conv": (lambda m, x: F.conv2d(x, m.side.weight * 0.5, stride=2), {}),
    "transposed": (lambda m, x: m.up(x), {"up": nn.ConvTranspose2d(8, 4, 3, 2, 1, output_padding=1, groups=2)}),
    "transposed dilated": (
        lambda m, x: m.up(x),
        {"up": nn.ConvTranspose2d(8, 4, (2, 3), (2, 1), (1, 3), dilation=(3, 1))},
    ),
    "upsample": (lambda m, x: F.interpolate(x, size=(13, 5)), {}),
    "shuffle": (lambda m, x: m.shuffle(x), {"shuffle": nn.ChannelShuffle(4)}),
    "pixels": (lambda m, x: m.out_of(m.into(x)), {"into": nn.PixelShuffle(2), "out_of": nn.PixelUnshuffle(4)}),
    "unflatten": (lambda m, x: m.part(x).flatten(1, 2), {"part": nn.Unflatten(1, (2, 4))}),
    "assert": (asserted, {}),
    "relu beside signed": (lambda m, x: torch.cat([F.relu(x), m.side(x)], 1), {}),
    "pooled relu beside signed": (lambda m, x: torch.cat([F.relu(F.max_pool2d(x, 3, 1, 1)), m.side(x)], 1), {}),
    "relu6 and relu": (lambda m, x: F.relu(4 * x) + F.relu6(4 * x), {}),
    "hard-swish": (lambda m, x: x * F.relu6(x + 3) / 6, {}),
    "swish": (lambda m, x: x * x.sigmoid(), {}),
    "clamps": (lambda m, x: x.clamp(-0.5, 0.7).clip(max=0.5), {}),
    "maximum": (lambda m, x: torch.maximum(x, torch.tensor(0.2)), {}),
    "glu": (lambda m, x: F.glu(x, 1), {}),
    **{
        type(act).__name__: (lambda m, x: m.act(x), {"act": act})
        for act in (
            nn.SELU(),
            nn.CELU(0.7),
            nn.ELU(0.5),
            nn.Hardtanh(),
            nn.Softsign(),
            nn.Softplus(2, 5),
            nn.LogSigmoid(),
            nn.Mish(),
            nn.GELU("tanh"),
            nn.LeakyReLU(0.2),
            nn.Hardsigmoid(),
            nn.Hardswish(),
            nn.Tanhshrink(),
            nn.Threshold(0.1, 0.3),
        )
    },
}


def canonical_output(net: nn.Module, images: Tensor) -> Tensor:
    """Return what the canonical graph of a net computes."""
    traced = trace(net, images)
    root = nn.Module()
    for target, module in traced.modules.items():
        setattr(root, target.replace(".", "_"), module.eval())
    for node in traced.graph.nodes:
        if node.op == "call_module":
            node.target = str(node.target).replace(".", "_")
    with torch.no_grad():
        return fx.GraphModule(root, traced.graph)(images)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CASES)
def test_the_canonical_graph_is_the_net(name: str) -> None:
    operation, parts = CASES[name]
    net = Body(operation, **parts)
    with torch.no_grad():
        expected = net(IMAGE.clone())
        before = IMAGE.clone()
        torch.testing.assert_close(canonical_output(net, IMAGE), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(IMAGE, before), "the images are left alone"


CLOSE = (
    "relu in place",
    "slice",
    "scaled branch",
    "normalized",
    "option a",
    "transposed",
    "relu beside signed",
    "pooled relu beside signed",
    "relu6 and relu",
    "hard-swish",
    "norm behind relu",
    "y * y",
    "expand_as",
)


@pytest.mark.parametrize("name", CLOSE)
def test_eight_bits_come_close(name: str) -> None:
    operation, parts = CASES[name]
    net = Body(operation, **parts)
    torch.manual_seed(0)  # the parts were drawn when this file was read
    for module in (inner for part in parts for inner in getattr(net, part).modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    student = prepare(net, QuantSpec(weight_bits=8, act_bits=8), IMAGE)
    for layer in quantizers.quant_layers(student).values():
        if layer.bn is not None:
            layer.bn.momentum = 0.0
    calibrate(student, [IMAGE])
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        net.train()(IMAGE)
        expected, got = net.eval()(IMAGE), student.eval()(IMAGE)
    assert float((got - expected).abs().mean()) < 0.06 * float(expected.std()), "no ReLU is lost"


DROPPED: dict[str, Operation] = {
    "functional": lambda m, x: F.dropout(x, 0.5, m.training),
    "keyword, in place": lambda m, x: F.dropout(F.relu(x), p=0.5, training=m.training, inplace=True),
    "channels": lambda m, x: F.dropout2d(x, 0.5, m.training),
    "alpha": lambda m, x: F.alpha_dropout(x, 0.5, m.training),
    "under a condition": lambda m, x: F.dropout(x) if m.training else x,
    "one module twice": lambda m, x: m.drop(m.side(m.drop(x))),
}


@pytest.mark.parametrize("name", DROPPED)
def test_drop_out_is_active_in_training(name: str) -> None:
    net = Body(DROPPED[name], drop=nn.Dropout(0.5)).train()
    student = prepare(net, QuantSpec(weight_bits=8, act_bits=8), IMAGE)
    calibrate(student, [IMAGE])
    with torch.no_grad():
        student.train()
        assert not torch.equal(student(IMAGE), student(IMAGE))
        student.eval()
        assert torch.equal(student(IMAGE), student(IMAGE))
    drops = [m for m in student.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    assert len(drops) == (2 if "twice" in name else 1) and all(drop.p == 0.5 for drop in drops)


def test_an_auxiliary_head_of_training_is_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head, self.aux = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Any:
            x = F.relu(self.conv(x))
            return (self.head(F.dropout(x, training=self.training)), self.aux(x)) if self.training else self.head(x)

    student = prepare(Net(), QuantSpec(), IMAGE)
    assert set(quantizers.quant_layers(student)) == {"conv", "head"}
    assert any(isinstance(m, nn.Dropout) for m in student.modules())


WEIGHTS: dict[str, Callable[[nn.Module], Any]] = {
    "pruned": lambda m: prune.random_unstructured(m, "weight", amount=0.5),
    "spectral norm": spectral_norm, "parametrized": parametrizations.weight_norm,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", [*WEIGHTS, "weight norm"])
def test_effective_weights(name: str) -> None:
    net = Body(lambda m, x: m.side(x))
    torch.manual_seed(0)
    WEIGHTS.get(name, weight_norm)(net.side)
    net.train()(IMAGE).sum().backward()  # hooks leave results of autograd in the module
    student = prepare(net.eval(), QuantSpec(), IMAGE)
    with torch.no_grad():
        net(IMAGE)
    torch.testing.assert_close(quantizers.quant_layers(student)["side"].weight, net.side.weight, rtol=1e-4, atol=1e-5)


def test_wrapped_nets_and_optional_arguments() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.graph, self.meta = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor, is_feat: bool = False, *args: Any, scale: float = 2.0) -> Any:
            y = self.meta(F.relu(self.graph(F.relu(self.conv(x))))) * scale
            return (y, x) if is_feat else {"logits": y}

    for wrapped in (Net(), nn.DataParallel(Net()), torch.compile(Net())):
        student = prepare(wrapped, QuantSpec(), IMAGE)  # type: ignore[arg-type]
        assert list(quantizers.quant_layers(student)) == ["conv", "graph_", "meta_"]
        assert student.tap_paths == {"conv": "conv", "graph": "graph_"}
        calibrate(student, [IMAGE])
        assert list(student(IMAGE)) == ["logits"]


def test_frozen_and_learned_scales() -> None:
    """A constant that no layer takes in is a frozen depthwise layer, a learned one a layer that learns."""
    net = Body(lambda m, x: (F.relu(x) * 0.3 + m.side(x)) * m.gamma)
    student = prepare(net, QuantSpec(), IMAGE)
    layers = {name: layer for name, layer in quantizers.quant_layers(student).items() if "mul" in name}
    assert {name: layer.weight.requires_grad for name, layer in layers.items()} == {"mul": False, "mul_1": True}
    assert all(layer.bias is None for layer in layers.values())


def _is_side(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.in_channels == 8


def test_the_guard_names_the_first_node_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rewrite.folded

    def broken(layer: Any, extras: Any) -> Any:
        made, norm = original(layer, extras)
        made = copy.deepcopy(made)
        made.weight.data.mul_(1.01 if _is_side(made) else 1)
        return made, norm

    monkeypatch.setattr(rewrite, "folded", broken)
    net = Body(lambda m, x: m.side(x))
    with pytest.raises(RewriteError, match=r"^side.*another function than the float network"):
        prepare(net, QuantSpec(), IMAGE)
    assert prepare(net, QuantSpec(), IMAGE, verify=False) is not None


def test_the_guard_sees_behind_a_factor_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    original = rewrite.folded

    def broken(layer: Any, extras: Any) -> Any:
        made, norm = original(layer, extras)
        made = copy.deepcopy(made)
        made.weight.data.add_(0.1 if _is_side(made) and norm is not None else 0)
        return made, norm

    net = Body(lambda m, x: x + m.last(m.side(x)), last=nn.BatchNorm2d(8))
    nn.init.zeros_(net.last.weight)
    monkeypatch.setattr(rewrite, "folded", broken)
    with pytest.raises(RewriteError, match=r"^last.*another function than the float network"):
        prepare(net, QuantSpec(), IMAGE)


def test_statistics_and_random_numbers_are_left_alone() -> None:
    net = Body(lambda m, x: m.side(x)).train()
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trace(net, IMAGE)
    assert torch.equal(torch.rand(3), expected)
    student = prepare(net, QuantSpec(), IMAGE)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(
        bool((layer.bn.running_mean == 0).all()) for layer in quantizers.quant_layers(student).values() if layer.bn
    )


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((1.0, 1.0), r"clamp.*its bounds leave only one value \(1 and 1\); use a lower and a higher bound"),
        ((2.0, 1.0), r"clamp.*its bounds leave only one value \(2 and 1\)"),
        ((0.0, 0.0), r"clamp.*its bounds leave only one value \(0 and 0\)"),
        ((0.0, math.nan), "clamp.*its bounds leave only one value"),
    ],
)
def test_bounds_that_leave_nothing_are_named(bounds: tuple[float, float], message: str) -> None:
    """The network runs, so it is not said to fail."""
    with pytest.raises(RewriteError, match=message):
        prepare(_Clamped(*bounds), QuantSpec(), example_inputs=torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("bounds", [(-math.inf, math.inf), (None, math.inf), (-1.0, math.inf), (0, math.inf)])
def test_infinite_bounds_are_none(bounds: tuple[float | None, float]) -> None:
    prepare(_Clamped(*bounds), QuantSpec(), example_inputs=torch.randn(2, 3, 8, 8))  # the guard compares


@pytest.mark.parametrize("bounds", [(math.inf, None), (None, -math.inf)])
def test_bounds_that_no_value_is_within_are_refused(bounds: tuple[float | None, float | None]) -> None:
    with pytest.raises(RewriteError):
        prepare(_Clamped(*bounds), QuantSpec(), example_inputs=torch.randn(2, 3, 8, 8))


def test_a_failure_to_spell_is_no_failure_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_pen: Any, _call: Any) -> Any:
        raise ZeroDivisionError("odd arguments")

    monkeypatch.setitem(table.OPERATORS, "clamp", broken)
    for in_place in (False, True):
        with pytest.raises(RewriteError, match=r"clamp.*its arguments cannot be expressed \(odd arguments\); use"):
            prepare(_Clamped(-1.0, 1.0, in_place=in_place), QuantSpec(), example_inputs=torch.randn(2, 3, 8, 8))


class _Clamped(nn.Module):
    """A convolution between bounds."""

    def __init__(self, low: float | None, high: float | None, *, in_place: bool = False) -> None:
        super().__init__()
        self.conv, self.head, self.bounds, self.in_place = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), (low, high), in_place

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(y.clamp_(*self.bounds) if self.in_place else y.clamp(*self.bounds))
