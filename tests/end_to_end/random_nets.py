"""Random convolutional nets as values: drawn by hypothesis, built as modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "none": nn.Identity,
}


@dataclass(frozen=True)
class ConvSpec:
    """A convolution with what follows it."""

    width: int  # channels a group, times groups
    groups: int  # 0: depthwise
    kernel: int
    stride: int
    dilation: int
    bias: bool
    batch_norm: str  # none, plain, wild (negative and vanishing factors)
    activation: str


@dataclass(frozen=True)
class BlockSpec:
    """``plain``: the convolutions in a row; ``residual``: added to the input; ``concat``: beside each other."""

    kind: str
    convs: tuple[ConvSpec, ...]
    activation: str  # after the sum
    pool: str  # none, max, average


@dataclass(frozen=True)
class NetSpec:
    """A net, its bits and its images."""

    channels: int
    size: tuple[int, int]
    batch: int
    blocks: tuple[BlockSpec, ...]
    head: str  # mean, flatten, two
    weight_bits: int
    act_bits: int
    edge_bits: int
    sum_bits: int
    per_channel: bool
    seed: int = field(default=0)


def conv_specs() -> st.SearchStrategy[ConvSpec]:
    return st.builds(
        ConvSpec,
        width=st.integers(1, 6),
        groups=st.sampled_from([1, 1, 2, 3, 0]),
        kernel=st.sampled_from([1, 3, 3, 5]),
        stride=st.sampled_from([1, 1, 2]),
        dilation=st.sampled_from([1, 1, 2]),
        bias=st.booleans(),
        batch_norm=st.sampled_from(["plain", "plain", "wild", "none"]),
        activation=st.sampled_from([*ACTIVATIONS, "relu", "relu", "relu"]),
    )


def net_specs() -> st.SearchStrategy[NetSpec]:
    blocks = st.builds(
        BlockSpec,
        kind=st.sampled_from(["plain", "residual", "concat"]),
        convs=st.lists(conv_specs(), min_size=1, max_size=3).map(tuple),
        activation=st.sampled_from(["relu", "relu", "none"]),
        pool=st.sampled_from(["none", "none", "max", "average"]),
    )
    return st.builds(
        NetSpec,
        channels=st.sampled_from([1, 3]),
        size=st.tuples(st.integers(5, 14), st.integers(5, 14)),
        batch=st.sampled_from([1, 7, 8]),
        blocks=st.lists(blocks, min_size=1, max_size=4).map(tuple),
        head=st.sampled_from(["mean", "flatten", "two"]),
        weight_bits=st.integers(2, 8),
        act_bits=st.integers(2, 8),
        edge_bits=st.sampled_from([8, 8, 4, 2]),
        sum_bits=st.sampled_from([8, 8, 8, 4]),
        per_channel=st.booleans(),
        seed=st.integers(0, 2**16),
    )


def make_conv(channels: int, spec: ConvSpec, *, keep_size: bool, width: int | None = None) -> tuple[nn.Module, int]:
    """Return a convolution with batch norm and activation, and its output channels."""
    groups = channels if spec.groups == 0 else spec.groups if channels % spec.groups == 0 else 1
    out = width or (channels if spec.groups == 0 else spec.width * groups)
    groups = groups if out % groups == 0 else 1
    padding = spec.dilation * (spec.kernel // 2)
    conv = nn.Conv2d(
        channels, out, spec.kernel, 1 if keep_size else spec.stride, padding, spec.dilation, groups, spec.bias
    )
    layers: list[nn.Module] = [conv]
    if spec.batch_norm != "none":
        layers.append(nn.BatchNorm2d(out))
        if spec.batch_norm == "wild":
            with torch.no_grad():
                layers[-1].weight.copy_(torch.randn(out))  # negative factors, too
                layers[-1].weight[0] = 1e-12  # a dead channel
    layers.append(ACTIVATIONS[spec.activation]())
    return nn.Sequential(*layers), out


class Block(nn.Module):
    def __init__(self, channels: int, spec: BlockSpec) -> None:
        super().__init__()
        self.kind, self.parts, current = spec.kind, nn.ModuleList(), channels
        outs = []
        for number, conv in enumerate(spec.convs):
            last = number == len(spec.convs) - 1
            width = channels if spec.kind == "residual" and last else None
            source = channels if spec.kind == "concat" else current
            part, current = make_conv(source, conv, keep_size=spec.kind != "plain", width=width)
            self.parts.append(part)
            outs.append(current)
        self.out = sum(outs) if spec.kind == "concat" else current
        self.activation = ACTIVATIONS[spec.activation]()
        pools = {"max": nn.MaxPool2d(3, 2, 1), "average": nn.AvgPool2d(2, 2, 0, ceil_mode=True)}
        self.pool = pools.get(spec.pool, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "concat":
            return self.pool(torch.cat([part(x) for part in self.parts], 1))
        y = x
        for part in self.parts:
            y = part(y)
        return self.pool(self.activation(x + y if self.kind == "residual" else y))


class RandomNet(nn.Module):
    """The net of a specification; five classes."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        blocks, channels = [], spec.channels
        for block in spec.blocks:
            blocks.append(Block(channels, block))
            channels = blocks[-1].out
        self.blocks = nn.Sequential(*blocks)
        self.mean = nn.AdaptiveAvgPool2d(1) if spec.head == "mean" else nn.Identity()
        with torch.no_grad():
            features = self.mean(self.blocks.eval()(torch.zeros(1, spec.channels, *spec.size))).flatten(1).size(1)
        if spec.head == "two":
            self.head: nn.Module = nn.Sequential(nn.Linear(features, 12), nn.ReLU(), nn.Linear(12, 5))
        else:
            self.head = nn.Linear(features, 5)
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.mean(self.blocks(x)), 1))
