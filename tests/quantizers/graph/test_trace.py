"""Float nets as graphs with kinds; what has no low-bit form is refused with the layer's name and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers import QuantSpec, RewriteError, prepare
from quantizers.graph.trace import pair, trace


class Body(nn.Module):
    """A convolution, an operation under test, and a classifier."""

    def __init__(self, operation: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        for name, module in modules.items():
            self.add_module(name, module)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self, F.relu(self.conv(x))))


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, nn.Module], str, str]] = {
    "unknown module": (lambda m, x: m.odd(x), {"odd": nn.PixelShuffle(1)}, "odd: PixelShuffle", "Replace it"),
    "layer norm": (lambda m, x: m.norm(x), {"norm": nn.GroupNorm(2, 8)}, "norm: GroupNorm", "layer norm -> batch norm"),
    "unknown function": (lambda m, x: F.interpolate(x, scale_factor=2.0), {}, "interpolate", "Replace it"),
    "softmax": (lambda m, x: torch.softmax(x, 1), {}, "softmax", "Replace it"),
    "difference": (lambda m, x: x - m.other(x), {"other": nn.Conv2d(8, 8, 1)}, "sub", "Replace it"),
    "constant sum": (lambda m, x: x + 1.0, {}, "add.*with a constant", "fold the constant"),
    "constant product": (lambda m, x: 2 * x, {}, "mul.*with a constant", "fold the constant"),
    "alpha": (
        lambda m, x: torch.add(x, m.other(x), alpha=2), {"other": nn.Conv2d(8, 8, 1)}, "add: a sum with alpha", "scale",
    ),
    "padding mode": (
        lambda m, x: m.odd(x), {"odd": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")},
        "odd: padding mode 'reflect'", "use zeros",
    ),
    "transposed": (lambda m, x: m.odd(x), {"odd": nn.ConvTranspose2d(8, 8, 1)}, "odd: ConvTranspose2d", "Replace"),
    "no statistics": (
        lambda m, x: m.norm(m.odd(x)),
        {"odd": nn.Conv2d(8, 8, 1), "norm": nn.BatchNorm2d(8, track_running_stats=False)},
        "norm: batch norm without running statistics", "track_running_stats=True",
    ),
    "indices": (
        lambda m, x: m.pool(x)[0], {"pool": nn.MaxPool2d(2, return_indices=True)},
        "pool: pooling with indices", "use plain",
    ),
    "divisor": (lambda m, x: m.pool(x), {"pool": nn.AvgPool2d(2, divisor_override=3)}, "pool: pooling", "use plain"),
    "slice": (lambda m, x: x[:, :8], {}, "getitem: indexing a tensor", "chunk or split"),
    "one-sided mean": (lambda m, x: x.mean(3, keepdim=True), {}, r"mean: a mean over \(3,\)", r"x\.mean\(\(2, 3\)\)"),
    "channel mean": (lambda m, x: x * x.mean(1, keepdim=True), {}, r"mean: a mean over \(1,\)", r"x\.mean\(\(2, 3\)\)"),
    "called twice": (lambda m, x: m.odd(F.relu(m.odd(x))), {"odd": nn.Conv2d(8, 8, 1)}, "odd: is called", "own copy"),
    "wrong example": (lambda m, x: m.odd(x), {"odd": nn.Conv2d(4, 8, 1)}, "odd: the float network fails", "channels"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_layer_and_the_way_out(name: str) -> None:
    operation, modules, layer, way_out = REFUSED[name]
    with pytest.raises(RewriteError, match=layer) as caught:
        prepare(Body(operation, **modules), QuantSpec(), example_inputs=IMAGE)
    caught.match(way_out)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_control_flow_is_refused() -> None:
    def branch(_m: nn.Module, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    with pytest.raises(RewriteError, match=r"Body: torch\.fx cannot trace .* remove data-dependent control flow"):
        trace(Body(branch), IMAGE)


def test_batch_norm_1d_alone_is_refused() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )
    with pytest.raises(RewriteError, match="4: batch norm after no linear layer; put it behind one"):
        prepare(net, QuantSpec(), example_inputs=IMAGE)


def test_kinds_shapes_and_paths() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    )
    traced = trace(net, IMAGE)
    rows = [(traced.path(n), n.meta["kind"], n.meta["shape"]) for n in traced.graph.nodes if n.op == "call_module"]
    assert rows == [
        ("0", "conv", (2, 4, 6, 6)), ("1", "norm", (2, 4, 6, 6)), ("2", "relu", (2, 4, 6, 6)),
        ("3", "maxpool", (2, 4, 3, 3)), ("4", "shape", (2, 36)), ("5", "linear", (2, 2)),
    ]  # fmt: skip


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    trace(net, IMAGE)
    assert net.training and net[1].training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_hardtanh_from_zero_is_a_relu() -> None:
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardtanh(0.0, 4.0)), IMAGE)
    assert [n.meta["kind"] for n in traced.graph.nodes] == ["placeholder", "conv", "relu", "output"]
    traced = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardtanh(-1.0, 1.0)), IMAGE)
    assert [n.meta["kind"] for n in traced.graph.nodes] == ["placeholder", "conv", "function", "output"]


@pytest.mark.parametrize(("value", "expected"), [(3, (3, 3)), ((1, 2), (1, 2)), ([2], (2, 2))])
def test_pair(value: Any, expected: tuple[int, int]) -> None:
    assert pair(value) == expected
