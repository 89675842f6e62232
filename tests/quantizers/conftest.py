"""Small float nets that use every rewriting rule, and a reference that computes an integer view exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import quantizers
from quantizers import integer as ir

SIZE = 12


def conv_bn(inner: int, outer: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    options.setdefault("padding", kernel // 2)
    return nn.Sequential(nn.Conv2d(inner, outer, kernel, bias=False, **options), nn.BatchNorm2d(outer))


class Net(nn.Module):
    """A stem, whatever a subclass puts in :meth:`body`, and a classifier."""

    width = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.relu = nn.ReLU(inplace=True)
        self.build()
        self.head = nn.Linear(self.width, 5)

    def build(self) -> None: ...

    def body(self, x: Tensor) -> Tensor:
        return x

    def forward(self, images: Tensor) -> Tensor:
        x = self.body(self.relu(self.stem(images)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Plain(Net):
    def build(self) -> None:
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def body(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)))


class Shapes(Net):
    """Grouped, depthwise, 1x1, strided, dilated, padding='same', with bias and without batch norm."""

    def build(self) -> None:
        self.layers = nn.Sequential(
            conv_bn(8, 8, groups=4), nn.ReLU(), conv_bn(8, 8, groups=8), nn.ReLU6(),
            conv_bn(8, 8, 1, stride=2), nn.ReLU(), conv_bn(8, 8, dilation=2, padding=2), nn.ReLU(),
            nn.Conv2d(8, 8, (3, 5), padding="same"), nn.ReLU(),
            nn.Conv2d(8, 8, (3, 1), padding="valid"), nn.ReLU(), nn.Dropout2d(0.1),
        )  # fmt: skip

    def body(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Residual(Net):
    """A projection, then two identity blocks: sums in a chain."""

    def build(self) -> None:
        self.a = nn.ModuleList(conv_bn(8, 8) for _ in range(3))
        self.b = nn.ModuleList(conv_bn(8, 8) for _ in range(3))
        self.project = conv_bn(8, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        for index, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            skip = self.project(x) if index == 0 else x
            x = self.relu(b(self.relu(a(x))) + skip)
        return x


class Bottleneck(Net):
    """Linear bottlenecks: signed sums in a chain, without ReLU."""

    def build(self) -> None:
        self.reduce = conv_bn(8, 4, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_bn(4, 12, 1), nn.ReLU6(), conv_bn(12, 12, groups=12), nn.ReLU6(), conv_bn(12, 4, 1))
            for _ in range(2)
        )
        self.expand = conv_bn(4, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        for block in self.blocks:
            x = x + block(x)
        return F.relu6(self.expand(x))


class PreActivation(Net):
    def build(self) -> None:
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)

    def body(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        x = x + self.conv2(F.relu(self.bn2(y)))
        return F.relu(x)


class Dense(Net):
    """Every value is read by several concatenations; batch norm behind them."""

    width = 16

    def build(self) -> None:
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (8, 12))
        self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1, bias=False) for width in (8, 12))

    def body(self, x: Tensor) -> Tensor:
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return F.relu(torch.cat(features, 1))


class Branches(Net):
    """Inception and fire blocks: concatenations of ReLUs and of a pooled branch."""

    width = 16

    def build(self) -> None:
        self.left, self.right = conv_bn(8, 4, 1), conv_bn(8, 4)
        self.pool = nn.MaxPool2d(3, 1, padding=1)
        self.wide = conv_bn(16, 8)

    def body(self, x: Tensor) -> Tensor:
        y = torch.cat([self.relu(self.left(x)), self.relu(self.right(x)), self.pool(x)], dim=1)
        return torch.cat((self.relu(self.wide(y)), x), 1)


class SqueezeExcite(Net):
    def build(self) -> None:
        self.conv = conv_bn(8, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x), inplace=True)
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return x * scale


class Functions(Net):
    def build(self) -> None:
        self.convs = nn.ModuleList(conv_bn(8, 8, 1) for _ in range(4))
        self.swish = nn.Hardswish()

    def body(self, x: Tensor) -> Tensor:
        x = self.swish(self.convs[0](x))
        x = F.leaky_relu(self.convs[1](x), 0.3)
        x = F.gelu(self.convs[2](x))
        return F.hardsigmoid(self.convs[3](x))


class Pools(Net):
    """Pooling before ReLU, average pooling with padding, uneven adaptive pooling."""

    width = 8 * 3 * 2

    def build(self) -> None:
        self.conv = conv_bn(8, 8)
        self.max = nn.MaxPool2d(2)
        self.average = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False, ceil_mode=True)
        self.uneven = nn.AdaptiveAvgPool2d((3, 2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.stem(images))
        x = F.avg_pool2d(x, 3, 1, 1)
        x = self.relu(self.max(self.conv(x)))
        x = self.uneven(self.average(F.max_pool2d(x, kernel_size=2, stride=1)))
        return self.head(x.view(x.size(0), -1))


class Shuffle(Net):
    """chunk, channel shuffle and concatenation."""

    def build(self) -> None:
        self.branch = nn.Sequential(conv_bn(4, 4, 1), nn.ReLU(), conv_bn(4, 4, groups=4), conv_bn(4, 4, 1), nn.ReLU())

    def body(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        x = torch.cat((first, self.branch(second)), dim=1)
        batch, channels, height, width = x.size()
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(batch, channels, height, width)


class Perceptron(Net):
    """Linear layers with BatchNorm1d, drop-out, functional forms."""

    def build(self) -> None:
        self.hidden, self.norm, self.drop = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Dropout(0.2)
        self.head2 = nn.Linear(12, 8)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.stem(images)).mean([2, 3])
        x = self.drop(F.relu(self.norm(self.hidden(x)), inplace=True))
        return self.head(self.relu(self.head2(x)))


NETS: dict[str, type[Net]] = {
    "bottleneck": Bottleneck, "branches": Branches, "dense": Dense, "functions": Functions,
    "perceptron": Perceptron, "plain": Plain, "pools": Pools, "preactivation": PreActivation, "residual": Residual,
    "shapes": Shapes, "shuffle": Shuffle, "squeeze_excite": SqueezeExcite,
}  # fmt: skip


_students: dict[str, Any] = {}  # calibration is the slow part


@pytest.fixture(autouse=True)
def eager(one_eager_thread: None) -> None:
    """Compiling costs seconds: the fused path is tested where a test asks for it."""


@pytest.fixture(params=sorted(NETS))
def net_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    def make(name: str, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        net = NETS[name]()
        for module in net.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):  # negative factors and uneven shifts, too
                nn.init.normal_(module.weight, 0.6, 0.6)
                nn.init.normal_(module.bias, 0.1, 0.3)
        return net

    return make


@pytest.fixture
def images() -> Callable[..., Tensor]:
    def make(count: int = 4, seed: int = 1) -> Tensor:
        return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def make_student(make_net: Callable[..., nn.Module], images: Callable[..., Tensor]) -> Callable[..., Any]:
    """Return a calibrated student in eval mode, a separate copy."""

    def make(name: str = "plain", weight_bits: int = 2, act_bits: int = 2, seed: int = 0, **options: Any) -> Any:
        spec = quantizers.QuantSpec(weight_bits=weight_bits, act_bits=act_bits, **options)
        key = f"{name} {seed} {spec}"
        if key not in _students:
            student = quantizers.prepare(make_net(name, seed), spec, example_inputs=images(2))
            quantizers.calibrate(student, [images(8, seed=5), images(8, seed=6)])
            _students[key] = student.eval()
        return copy.deepcopy(_students[key])

    return make


@pytest.fixture
def train_step() -> Callable[..., Tensor]:
    def step(student: nn.Module, batch: Tensor) -> Tensor:
        student.train()
        student.zero_grad()
        labels = torch.arange(batch.size(0)) % 5
        loss = F.cross_entropy(student(batch), labels)
        loss.backward()
        return loss

    return step


@pytest.fixture
def compute() -> Callable[..., dict[str, Tensor]]:
    return compute_view


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish, "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid, "gelu": F.gelu, "leaky_relu": F.leaky_relu,
}  # fmt: skip


def compute_view(view: ir.IntegerView, batch: Tensor) -> dict[str, Tensor]:
    """Return every edge in float64: codes where it is on a grid, else real values; sums of codes are exact."""
    edges = {view.inputs[0]: batch.double()}
    for node in view.nodes:
        edges[node.output] = _compute(view, node, [edges[name] for name in node.inputs])
    return edges


def _compute(view: ir.IntegerView, node: Any, operands: list[Tensor]) -> Tensor:
    grids = [view.grids.get(name) for name in node.inputs]
    real = [x if grid is None else x * grid.scale for x, grid in zip(operands, grids, strict=True)]
    if isinstance(node, ir.Quantize):
        return torch.clamp(torch.round(real[0] / node.grid.scale), node.grid.low, node.grid.high)
    if isinstance(node, (ir.Conv, ir.Linear)):
        return _layer(node, operands[0], grids[0])
    if isinstance(node, ir.Add):
        assert grids[0] is not None and grids[1] is not None and grids[0].scale == grids[1].scale
        return (operands[0] + operands[1]) * grids[0].scale
    if isinstance(node, ir.Mul):
        return real[0] * real[1]
    if isinstance(node, ir.Concat):
        assert len(set(grids)) == 1, "operands of a concatenation share one grid"
        return torch.cat(operands, node.axis)
    if isinstance(node, ir.MaxPool):
        return F.max_pool2d(operands[0], node.kernel, node.stride, node.padding[:2], node.dilation, node.ceil_mode)
    if isinstance(node, ir.AveragePool):
        padding, count = node.padding[:2], node.count_include_pad
        return F.avg_pool2d(real[0], node.kernel, node.stride, padding, node.ceil_mode, count)
    if isinstance(node, ir.GlobalAveragePool):
        return real[0].mean((2, 3), keepdim=node.keepdims)
    if isinstance(node, ir.Function):
        return FUNCTIONS[node.op](real[0], **node.attributes)
    assert isinstance(node, ir.Shape)
    return _move(node, operands[0])


def _layer(node: Any, codes: Tensor, grid: ir.Grid | None) -> Tensor:
    assert grid is not None
    weights = torch.from_numpy(node.weights).double()
    bias = None if node.bias is None else torch.from_numpy(node.bias).double()
    if isinstance(node, ir.Linear):
        sums = F.linear(codes, weights, bias)
    else:
        top, left, bottom, right = node.padding
        padded = F.pad(codes, (left, right, top, bottom))
        sums = F.conv2d(padded, weights, bias, node.stride, 0, node.dilation, node.groups)
    assert torch.equal(sums, sums.round()) and float(sums.abs().max()) < 2**31
    units = torch.from_numpy(node.weight_scale.astype(np.float64)) * grid.scale
    return sums * units.reshape((1, -1) + (1,) * (sums.dim() - 2))


def _move(node: ir.Shape, x: Tensor) -> Tensor:
    attributes: Any = node.attributes
    if node.op == "reshape":
        return x.reshape(attributes["shape"])
    if node.op == "transpose":
        return x.permute(attributes["perm"])
    if node.op == "slice":
        wanted = torch.arange(attributes["start"], attributes["end"], attributes["step"])
        return x.index_select(attributes["axis"], wanted)
    if node.op == "gather":
        return x.index_select(attributes["axis"], torch.tensor(attributes["indices"]))
    if node.op == "pad":
        pairs = zip(reversed(attributes["before"]), reversed(attributes["after"]), strict=True)
        return F.pad(x, [size for pair in pairs for size in pair])
    if node.op == "expand":
        return x.expand(x.size(0), *attributes["shape"][1:])
    assert node.op == "identity"
    return x
