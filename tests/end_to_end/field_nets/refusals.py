"""What has no integer form: refused by name, before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "no integer form"


@net(KIND, verdict=REFUSED, is_fast=True, norm=lambda: nn.LayerNorm([8, 8, 8]), says="norm")
def layer_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(self.conv(x)))


@net(KIND, verdict=REFUSED, says="layer_norm")
def layer_norm_function(self: Any, x: Tensor) -> Tensor:
    return self.head(F.layer_norm(self.conv(x), [8, 8, 8]))


@net(KIND, verdict=REFUSED, norm=lambda: nn.GroupNorm(2, 8), says="norm")
def group_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(self.conv(x)))


@net(KIND, verdict=REFUSED, norm=lambda: nn.InstanceNorm2d(8), says="norm")
def instance_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(self.conv(x)))


@net(KIND, verdict=REFUSED, norm=lambda: nn.LocalResponseNorm(2), says="norm")
def local_response_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.norm(self.relu(self.conv(x))))


@net(KIND, verdict=REFUSED, is_fast=True, attend=lambda: nn.MultiheadAttention(8, 2, batch_first=True), says="attend")
def attention(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).flatten(2).transpose(1, 2)
    return self.fc(self.attend(y, y, y)[0].mean(1))


@net(KIND, verdict=REFUSED, says="matmul|bmm")
def product_of_matrices(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(torch.matmul(y, self.side(x)))


@net(KIND, verdict=REFUSED, says="einsum")
def einstein_sum(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(torch.einsum("bchw,bcwv->bchv", y, y))


@net(KIND, verdict=REFUSED, says="attention")
def attention_function(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).flatten(2).transpose(1, 2)
    return self.fc(F.scaled_dot_product_attention(y, y, y).mean(1))


@net(KIND, verdict=REFUSED, cell=lambda: nn.LSTM(8, 8, batch_first=True), says="cell")
def recurrent(self: Any, x: Tensor) -> Tensor:
    y, _ = self.cell(self.relu(self.conv(x)).flatten(2).transpose(1, 2))
    return self.fc(y[:, -1])


@net(KIND, verdict=REFUSED, says="fft")
def fourier(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.fft.fft2(self.conv(x)).real)


@net(KIND, verdict=REFUSED, says="sort|topk")
def top_values(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.conv(x).flatten(2).topk(3, dim=2)[0].mean(2))


@net(KIND, verdict=REFUSED, says="std|var")
def deviation_pool(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.conv(x).std((2, 3)))


@net(KIND, verdict=REFUSED, says=r"grid_sample|refusals\.py")
def warped(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(F.grid_sample(y, torch.zeros(1, 8, 8, 2).expand(y.size(0), -1, -1, -1), align_corners=False))


@net(KIND, verdict=REFUSED, says="where|gt")
def chosen_by_value(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(torch.where(y > self.side(x), y, 0.1 * y))


@net(KIND, verdict=REFUSED, says="sin|cos")
def sine(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.sin(self.conv(x)))


@net(KIND, verdict=REFUSED, says=r"numpy|refusals\.py")
def through_an_array(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(torch.from_numpy(y.detach().numpy() * 2))


@net(KIND, verdict=REFUSED, says="half|float|dtype|to")
def half_precision_inside(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x)).half().float())


@net(KIND, verdict=REFUSED, says="cumsum")
def running_sum(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.cumsum(self.conv(x), 3))


@net(KIND, verdict=REFUSED, says="pow|sqrt|mean|clamp")
def generalized_mean_pool(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).clamp(min=1e-6)
    return self.fc(y.pow(3).mean((2, 3)).pow(1 / 3))
