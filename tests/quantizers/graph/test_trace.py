"""Float nets as graphs with kinds; what has no low-bit form is refused with the layer's name and a way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers import QuantSpec, RewriteError, prepare
from quantizers.graph.spelling.call import pair
from quantizers.graph.trace import trace


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
    "group norm": (
        lambda m, x: m.norm(x),
        {"norm": nn.GroupNorm(2, 8)},
        "norm: GroupNorm",
        "batch norm instead of group",
    ),
    "instance norm": (
        lambda m, x: m.norm(x),
        {"norm": nn.InstanceNorm2d(8)},
        "norm: Inst",
        "batch norm instead of inst",
    ),
    "layer norm": (lambda m, x: m.norm(x), {"norm": nn.LayerNorm(8)}, "norm: LayerNorm", "batch norm instead of layer"),
    "bilinear": (
        lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
        {},
        r"interpolate \(test_trace",
        "nearest",
    ),
    "softmax": (lambda m, x: torch.softmax(x, 1), {}, "softmax: Softmax is not last", "Replace it"),
    "absolute value": (lambda m, x: x.abs(), {}, r"abs \(test_trace\.py:\d+\): abs has no low-bit form", "Replace it"),
    "quotient": (lambda m, x: x / x.mean((2, 3), keepdim=True), {}, "div.*has no low-bit form", "with a product"),
    "dynamic convolution": (
        lambda m, x: F.conv2d(x, x.mean((0, 2, 3)).expand(8, 8).reshape(8, 8, 1, 1)),
        {},
        "mean.*batch",
        "other axes",
    ),
    "product of matrices": (lambda m, x: x @ x.transpose(2, 3), {}, "matmul", "layers with weights"),
    "einstein sum": (lambda m, x: torch.einsum("bchw,bchv->bcwv", x, x), {}, "einsum", "use Linear or Conv2d"),
    "attention": (
        lambda m, x: m.odd(*3 * [x.flatten(2)])[0].view_as(x),
        {"odd": nn.MultiheadAttention(64, 2, batch_first=True)},
        "odd: MultiheadAttention",
        "convolutional part",
    ),
    "padding mode": (
        lambda m, x: m.odd(x),
        {"odd": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")},
        "odd: padding mode 'reflect'",
        "use zeros",
    ),
    "padding value": (lambda m, x: F.pad(x, (1, 1), value=1.0), {}, "pad.*it pads with 1.0", "use zeros"),
    "no statistics": (
        lambda m, x: m.norm(m.odd(x)),
        {"odd": nn.Conv2d(8, 8, 1), "norm": nn.BatchNorm2d(8, track_running_stats=False)},
        "norm: batch norm without running statistics",
        "track_running_stats=True",
    ),
    "indices": (
        lambda m, x: x * m.pool(x)[1].float(),
        {"pool": nn.MaxPool2d(1, return_indices=True)},
        "pool: pooling with indices",
        "use plain",
    ),
    "divisor": (
        lambda m, x: m.pool(x),
        {"pool": nn.AvgPool2d(2, ceil_mode=True, divisor_override=3)},
        "pool: ceil_mode",
        "use plain",
    ),
    "called twice": (lambda m, x: m.odd(F.relu(m.odd(x))), {"odd": nn.Conv2d(8, 8, 1)}, "odd: is called", "own copy"),
    "wrong example": (lambda m, x: m.odd(x), {"odd": nn.Conv2d(4, 8, 1)}, "odd: the float network fails", "channels"),
    "mean over the batch": (lambda m, x: x - x.mean(0, keepdim=True), {}, "mean.*batch", "other axes"),
    "first image": (lambda m, x: x[:1], {}, "getitem.*batch", "other axes"),
    "images as channels": (lambda m, x: x.view(-1, 4, 8, 8).reshape(len(x), 8, 8, 8), {}, "view.*batch", "other axes"),
    "half": (lambda m, x: x.half().float(), {}, "half.*computes in float16", "float32"),
    "constant in a cat": (lambda m, x: torch.cat([x[:, 1:], torch.ones_like(x[:, :1])], 1), {}, "cat.*zero", "layer"),
    "drop-out that stays": (
        lambda m, x: F.dropout(x, 0.5),
        {},
        r"dropout: is on in eval\(\)",
        "training=self.training",
    ),
    "noise": (lambda m, x: x + torch.randn_like(x), {}, "add.*random numbers", "outside the network"),
    "noise in training": (
        lambda m, x: x + torch.randn_like(x) if m.training else x,
        {},
        "add.*random numbers",
        "outside the network",
    ),
    "other path in training": (lambda m, x: x * 2 if m.training else x, {}, r"mul.*train\(\).*eval\(\)", "both modes"),
    "other path for one image": (lambda m, x: 2 * x if len(x) == 3 else x, {}, "mul.*another size", "both modes"),
    "other factor in training": (
        lambda m, x: F.relu(x * (2 if m.training else 3) - 1),
        {},
        r"mul.*train\(\) on a batch of another size computes with other values or settings than eval\(\).*\(Affine\)",
        "both modes",
    ),
    "a mask of minus infinity": (
        lambda m, x: F.relu(x + torch.where(torch.arange(8) > 5, -torch.inf, 0.0)),
        {},
        r"add.*infinite or NaN",
        "factors of 0 and 1",
    ),
    "a NaN among factors": (lambda m, x: x * torch.tensor(torch.nan), {}, "mul.*infinite or NaN", "finite values"),
    "a kernel of NaN": (
        lambda m, x: F.conv2d(x, torch.full((8, 8, 1, 1), torch.nan)),
        {},
        "conv2d.*infinite or NaN",
        "finite values",
    ),
    "statistics that diverged": (
        lambda m, x: m.bn(x),
        {"bn": nn.BatchNorm2d(8)._apply(lambda tensor: tensor * torch.inf if tensor.is_floating_point() else tensor)},
        "bn.*not finite|bn.*infinite or NaN",
        "load others|finite values",
    ),
    "random slopes": (lambda m, x: m.odd(x), {"odd": nn.RReLU()}, "odd: RReLU", "LeakyReLU"),
    "through numpy": (lambda m, x: torch.from_numpy(x.numpy() * 2), {}, "does not depend on the images", "not numpy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_layer_and_the_way_out(name: str) -> None:
    operation, modules, layer, way_out = REFUSED[name]
    with pytest.raises(RewriteError, match=layer) as caught:
        prepare(Body(operation, **modules), QuantSpec(), example_inputs=IMAGE)
    caught.match(way_out)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_control_flow_is_refused_with_its_line() -> None:
    def branch(_m: nn.Module, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x

    line = branch.__code__.co_firstlineno + 1
    with pytest.raises(RewriteError, match=rf"Body: .*condition is taken from tensor values at test_trace\.py:{line};"):
        trace(Body(branch), IMAGE)


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


def test_nested_outputs_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            y = self.conv(x)
            return {"out": y, "taps": [y, F.relu(y)]}

    with pytest.raises(
        RewriteError, match="Net: returns a list within another; use one tuple, list or dict of tensors"
    ):
        trace(Net(), IMAGE)
