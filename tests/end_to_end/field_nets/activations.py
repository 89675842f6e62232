"""Activations: every module, function, method, and what people write by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "activations"

MODULES: dict[str, Any] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid, "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.1), "prelu": nn.PReLU, "prelu_per_channel": lambda: nn.PReLU(8),
    "elu": lambda: nn.ELU(0.7), "celu": lambda: nn.CELU(0.6), "selu": nn.SELU, "mish": nn.Mish,
    "softplus": nn.Softplus, "softplus_beta": lambda: nn.Softplus(2.0, 5.0), "softsign": nn.Softsign,
    "hardtanh": nn.Hardtanh, "hardtanh_from_zero": lambda: nn.Hardtanh(0.0, 4.0),
    "hardtanh_shifted": lambda: nn.Hardtanh(-0.5, 2.0), "logsigmoid": nn.LogSigmoid,
    "threshold": lambda: nn.Threshold(0.1, -0.2), "tanhshrink": nn.Tanhshrink, "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
}  # fmt: skip
FAST = ("prelu_per_channel", "gelu_tanh", "softplus", "hardtanh", "selu")


def _module(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        return self.head(self.conv2(y) + y)

    forward.__name__ = f"module_{name}"
    net(KIND, act=MODULES[name], is_fast=name in FAST)(forward)


for _name in MODULES:
    _module(_name)

FUNCTIONS: dict[str, Any] = {
    "relu": F.relu, "torch_relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "sigmoid": F.sigmoid, "torch_tanh": torch.tanh, "leaky_relu": F.leaky_relu,
    "leaky_relu_slope": lambda y: F.leaky_relu(y, negative_slope=0.3), "elu": lambda y: F.elu(y, alpha=0.5),
    "celu": F.celu, "selu": F.selu, "torch_selu": torch.selu, "mish": F.mish, "softplus": F.softplus,
    "softsign": F.softsign, "hardtanh": F.hardtanh, "hardtanh_bounds": lambda y: F.hardtanh(y, 0.0, 2.0),
    "logsigmoid": F.logsigmoid, "threshold": lambda y: F.threshold(y, 0.0, 0.0),
    "clamp": lambda y: torch.clamp(y, -1, 1), "clamp_min": lambda y: y.clamp(min=0),
    "clamp_max": lambda y: y.clamp(max=1.0), "clip": lambda y: torch.clip(y, 0, 6),
    "clamp_min_method": lambda y: y.clamp_min(0.0),
    "clamp_above_zero": lambda y: y.clamp(0.5, 3.0), "clamp_min_negative": lambda y: y.clamp(min=-0.3),
    "maximum_with_zero": lambda y: torch.maximum(y, torch.zeros(1)),
    "hand_silu": lambda y: y * torch.sigmoid(y), "hand_silu_method": lambda y: y.mul(y.sigmoid()),
    "hand_swish_beta": lambda y: y * torch.sigmoid(1.5 * y),
    "hand_hardswish": lambda y: y * F.relu6(y + 3) / 6,
    "hand_hardswish_grouped": lambda y: y * (F.relu6(y + 3.0) / 6.0),
    "hand_hardswish_clamp": lambda y: y * (y + 3).clamp(0, 6) / 6,
    "hand_hardswish_hardtanh": lambda y: y * F.hardtanh(y + 3, 0.0, 6.0) / 6.0,
    "hand_hardsigmoid": lambda y: F.relu6(y + 3) / 6, "hand_hardsigmoid_slope": lambda y: (0.2 * y + 0.5).clamp(0, 1),
    "hand_mish": lambda y: y * torch.tanh(F.softplus(y)),
    "hand_gelu": lambda y: y * torch.sigmoid(1.702 * y), "hand_leaky": lambda y: F.relu(y) - 0.2 * F.relu(-y),
    "squared_relu": lambda y: F.relu(y) ** 2, "crelu": lambda y: torch.cat([F.relu(y), F.relu(-y)], 1)[:, 4:12],
    "relu_of_relu": lambda y: F.relu(F.relu(y)), "relu6_of_relu": lambda y: F.relu6(F.relu(y)),
    "relu_of_relu6": lambda y: F.relu(F.relu6(y)), "silu_of_relu": lambda y: F.silu(F.relu(y)),
    "one_minus_relu": lambda y: F.relu(1 - F.relu(y)), "absolute_value": torch.abs,
    "relu_times_sign": lambda y: y * (y > 0), "exponential": lambda y: torch.exp(-F.relu(y)),
    "glu": lambda y: F.glu(y, 1).repeat(1, 2, 1, 1), "maxout": lambda y: torch.max(y, 0.5 * y),
    "prelu_function": lambda y: F.prelu(y, torch.tensor([0.2])),
}  # fmt: skip
REFUSALS = {"absolute_value": r"^abs\b", "relu_times_sign": r"^gt\b", "exponential": r"^exp\b", "maxout": r"^max\b"}
FAST_FUNCTIONS = ("hand_hardswish", "clamp", "hand_silu", "relu_of_relu6")


def _function(name: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = FUNCTIONS[name](self.bn(self.conv(x)))
        return self.head(self.conv2(y) + y)

    forward.__name__ = f"function_{name}"
    verdict = {"verdict": REFUSED, "says": REFUSALS[name]} if name in REFUSALS else {}
    net(KIND, is_fast=name in FAST_FUNCTIONS, **verdict)(forward)


for _name in FUNCTIONS:
    _function(_name)


@net(KIND)
def relu_at_the_end(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.head(self.relu(self.conv(x))))


@net(KIND)
def sigmoid_at_the_end(self: Any, x: Tensor) -> Tensor:
    return torch.sigmoid(self.head(self.relu(self.conv(x))))


@net(KIND)
def relu_first(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv(F.relu(x)))


@net(KIND)
def silu_first_of_all(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv(F.silu(x)))


@net(KIND)
def relu6_beside_a_larger_relu(self: Any, x: Tensor) -> Tensor:
    a = F.relu6(4 * self.conv(x))
    b = F.relu(6 * self.side(x))
    return self.head(self.wide(torch.cat([a, b], 1)))


@net(KIND)
def relu6_in_a_sum_with_a_larger(self: Any, x: Tensor) -> Tensor:
    a = F.relu6(4 * self.conv(x))
    b = 9 * self.side(x)
    return self.head(self.conv2(a + b))


@net(KIND)
def relu6_behind_a_scaled_sum(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.relu6(5 * (self.conv(x) + self.side(x)))))


@net(KIND)
def relu_read_by_layer_and_raw_by_sum(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(self.conv2(F.relu(y)) + y)


@net(KIND)
def relu_and_relu6_of_one_value(self: Any, x: Tensor) -> Tensor:
    y = 4 * self.conv(x)
    return self.head(F.relu(y) - F.relu6(y))


@net(KIND)
def relu_beside_silu_in_a_cat(self: Any, x: Tensor) -> Tensor:
    return self.head(self.wide(torch.cat([F.relu(self.conv(x)), F.silu(self.side(x))], 1)))


@net(KIND)
def relu_cat_in_a_cat_with_signed(self: Any, x: Tensor) -> Tensor:
    a, b = F.relu(self.conv(x)), F.relu(self.side(x))
    inner = torch.cat([a, b], 1)
    return self.head(self.wide(inner)) + self.fc(torch.cat([inner, self.conv2(a)], 1)[:, 8:16].mean((2, 3)))


@net(KIND)
def relu_of_a_cat_with_signed_reader(self: Any, x: Tensor) -> Tensor:
    c = torch.cat([self.conv(x), self.side(x)], 1)
    return self.head(self.wide(F.relu(c)) + c[:, :8])


@net(KIND)
def relu_through_dropout_beside_signed(self: Any, x: Tensor) -> Tensor:
    y = F.relu(F.max_pool2d(F.dropout(self.conv(x), 0.0, self.training), 3, 1, 1))
    return self.head(torch.cat([y[:, :4], self.side(x)[:, 4:]], 1))
