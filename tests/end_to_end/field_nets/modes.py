"""What differs between training and evaluation: dropout in every spelling, branches on the mode, frozen layers."""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "dropout"


@net(KIND, is_fast=True, drops=True)
def function_with_flag(self: Any, x: Tensor) -> Tensor:
    y = F.dropout(self.relu(self.conv(x)), 0.4, self.training)
    return self.head(y)


@net(KIND, drops=True)
def function_with_keyword(self: Any, x: Tensor) -> Tensor:
    y = F.dropout(self.relu(self.conv(x)), p=0.4, training=self.training)
    return self.head(y)


@net(KIND, drops=True)
def function_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    F.dropout(y, 0.4, self.training, inplace=True)
    return self.head(self.conv2(y) + y)


@net(KIND, drops=True)
def function_of_channels(self: Any, x: Tensor) -> Tensor:
    y = F.dropout2d(self.relu(self.conv(x)), 0.4, self.training)
    return self.head(y)


@net(KIND, drops=True)
def torch_function(self: Any, x: Tensor) -> Tensor:
    y = torch.dropout(self.relu(self.conv(x)), 0.4, self.training)
    return self.head(y)


@net(KIND, drops=True, p=lambda: 0.4, is_fast=True)
def behind_an_if(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    if self.training:
        y = F.dropout(y, self.p)
    return self.head(y)


@net(KIND, drops=True, p=lambda: 0.4)
def behind_an_if_on_p(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    if self.p > 0:
        y = F.dropout(y, p=self.p, training=self.training)
    return self.head(y)


@net(KIND, drops=True, drop=lambda: nn.Dropout(0.4))
def module_before_last_layer(self: Any, x: Tensor) -> Tensor:
    y = torch.flatten(self.pool(self.relu(self.conv(x))), 1)
    return self.fc(self.drop(y))


@net(KIND, drops=True, drop=lambda: nn.Dropout2d(0.4))
def module_of_channels(self: Any, x: Tensor) -> Tensor:
    return self.head(self.drop(self.relu(self.conv(x))))


@net(KIND, drops=True, drop=lambda: nn.Dropout(0.4, inplace=True))
def module_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    z = self.drop(y)
    return self.head(self.conv2(z) + y)


@net(KIND, drops=True, drop=lambda: nn.Dropout(0.4), is_fast=True)
def module_used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.drop(self.relu(self.conv(x)))
    return self.head(self.drop(self.relu(self.conv2(y))))


@net(KIND, drops=True)
def between_sum_and_relu(self: Any, x: Tensor) -> Tensor:
    a = self.conv(x)
    y = F.dropout(a + self.conv2(a), 0.4, self.training)
    return self.head(F.relu(y))


@net(KIND, drops=True, depth=lambda: torchvision.ops.StochasticDepth(0.5, "row"))
def stochastic_depth(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.conv(x))
    return self.head(a + self.depth(self.conv2(a)))


def _stochastic_depth(mode: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        a = self.relu(self.conv(x))
        return self.head(a + torchvision.ops.stochastic_depth(self.conv2(a), 0.5, mode, self.training))

    forward.__name__ = f"stochastic_depth_function_of_a_{mode}"
    net(KIND, drops=True, is_fast=mode == "row")(forward)


for _mode in ("row", "batch"):
    _stochastic_depth(_mode)


@net(KIND, drops=True, drop=lambda: nn.AlphaDropout(0.4))
def alpha_dropout(self: Any, x: Tensor) -> Tensor:
    return self.head(self.drop(F.selu(self.conv(x))))


@net(KIND, verdict=REFUSED, says="dropout")
def always_on(self: Any, x: Tensor) -> Tensor:
    return self.head(F.dropout(self.relu(self.conv(x)), 0.4))


@net(KIND, verdict=REFUSED, says=r"rand|noise|random|training")
def noise_in_training(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    if self.training:
        y = y + 0.1 * torch.randn_like(y)
    return self.head(self.relu(y))


@net(KIND, verdict=REFUSED, says=r"rand|mask")
def noise_always(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(self.relu(y + torch.randn_like(y)))


@net(KIND, verdict=REFUSED, says=r"training|conv2|mode")
def other_path_in_training(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    if self.training:
        return self.head(self.conv2(y))
    return self.head(y)


@net(KIND, aux=lambda: nn.Linear(8, 5), same_in_training=False)
def auxiliary_head_in_training(self: Any, x: Tensor) -> Any:
    y = torch.flatten(self.pool(self.relu(self.conv(x))), 1)
    if self.training:
        return self.fc(y), self.aux(y)
    return self.fc(y)


@net(KIND, drops=True, drop=lambda: nn.Dropout(0.0), same_in_training=True)
def rate_zero_beside_another(self: Any, x: Tensor) -> Tensor:
    y = self.drop(self.relu(self.conv(x)))
    return self.head(F.dropout(y, 0.4, self.training))


@net(KIND, drops=True)
def before_a_concatenation(self: Any, x: Tensor) -> Tensor:
    a = F.dropout(self.relu(self.conv(x)), 0.4, self.training)
    return self.head(self.wide(torch.cat([a, self.side(x)], 1)))


@net(KIND, verdict=REFUSED, says="act", drops=True, act=lambda: nn.RReLU(0.1, 0.3))
def randomized_leaky_relu(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.act(self.conv(x))))


def _freeze(model: Any) -> None:
    model.conv.requires_grad_(False)
    model.bn.requires_grad_(False)


@net("frozen", setup=_freeze)
def first_layer_and_its_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn2(self.conv2(self.relu(self.bn(self.conv(x)))))))


def _freeze_bias(model: Any) -> None:
    model.conv.bias.requires_grad_(False)


@net("frozen", setup=_freeze_bias)
def a_bias_alone(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x)))


def _norm_in_eval(model: Any) -> None:
    model.bn.eval()


@net("frozen", setup=_norm_in_eval)
def norm_left_in_eval(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.conv(x))))
