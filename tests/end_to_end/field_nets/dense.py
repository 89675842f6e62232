"""Linear layers and norms in every position: on 3-d and 4-d tensors, behind each other, without a layer before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "linear"


@net(KIND, is_fast=True, mix=lambda: nn.Linear(8, 8))
def on_channels_last(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).permute(0, 2, 3, 1)
    return self.head(self.mix(y).permute(0, 3, 1, 2))


@net(KIND, up=lambda: nn.Linear(8, 16), back=lambda: nn.Linear(16, 8), gamma=lambda: nn.Parameter(torch.randn(8)))
def convnext_block_with_batch_norm(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    z = self.bn(self.conv2(y)).permute(0, 2, 3, 1)
    z = (self.gamma * self.back(F.gelu(self.up(z)))).permute(0, 3, 1, 2)
    return self.head(y + z)


@net(KIND, mix=lambda: nn.Linear(8, 8))
def on_tokens(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).flatten(2).transpose(1, 2)
    return self.fc(F.relu(self.mix(y)).mean(1))


@net(KIND, mix=lambda: nn.Linear(64, 64))
def mixer_over_tokens(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).flatten(2)
    return self.fc((y + self.mix(y)).mean(2))


@net(KIND, mix=lambda: nn.Linear(8, 8, bias=False))
def on_rows_of_an_image(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(self.mix(x))))


@net(KIND, mix=lambda: nn.Linear(8, 8))
def on_four_axes_then_relu(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.relu(self.mix(self.relu(self.conv(x))))))


@net(KIND, shape=(1, 8, 8), deep=lambda: nn.Sequential(
    nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)))  # fmt: skip
def perceptron_with_norm(self: Any, x: Tensor) -> Tensor:
    return self.deep(x)


@net(KIND, is_fast=True, shape=(1, 8, 8), deep=lambda: nn.Sequential(
    nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 5)))  # fmt: skip
def perceptron_with_norm_behind_relu(self: Any, x: Tensor) -> Tensor:
    return self.deep(x)


@net(KIND, norm=lambda: nn.BatchNorm1d(8))
def norm_on_pooled_features(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.norm(self.pool(self.relu(self.conv(x))).flatten(1)))


@net(KIND, norm=lambda: nn.BatchNorm1d(5))
def norm_on_logits(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.head(self.relu(self.conv(x))))


@net(KIND, norm=lambda: nn.BatchNorm1d(5, affine=False))
def norm_without_factors_on_logits(self: Any, x: Tensor) -> Tensor:
    return self.norm(self.head(self.relu(self.conv(x))))


@net(KIND, norm=lambda: nn.BatchNorm1d(8))
def norm_on_tokens(self: Any, x: Tensor) -> Tensor:
    y = self.norm(self.conv(x).flatten(2))
    return self.fc(F.relu(y).mean(2))


@net(KIND, norm=lambda: nn.BatchNorm1d(8), mix=lambda: nn.Linear(64, 64))
def norm_behind_a_linear_on_tokens(self: Any, x: Tensor) -> Tensor:
    # the norm's channels are axis 1, the linear layer's are the last axis
    y = self.norm(self.mix(self.relu(self.conv(x)).flatten(2)))
    return self.fc(F.relu(y).mean(2))


@net(KIND, norm=lambda: nn.BatchNorm2d(8), mix=lambda: nn.Linear(8, 8))
def norm_behind_a_square_linear(self: Any, x: Tensor) -> Tensor:
    # eight channels, eight columns: the shapes cannot tell which axis the norm is on
    return self.head(F.relu(self.norm(self.mix(self.relu(self.conv(x))))))


@net(KIND, norm=lambda: nn.SyncBatchNorm(8), same_in_training=False)
def synchronized_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.norm(self.conv(x))))


@net(KIND)
def norm_behind_relu(self: Any, x: Tensor) -> Tensor:
    return self.head(self.bn(self.relu(self.conv(x))))


@net(KIND)
def norm_behind_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn2(self.bn(self.conv(x)))))


@net(KIND)
def norm_behind_a_layer_read_twice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(self.relu(self.bn(y)) + y)


@net(KIND, norm=lambda: nn.BatchNorm2d(8, affine=False, eps=0.01))
def norm_without_factors(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.norm(self.conv(x))))


@net(KIND, norm=lambda: nn.BatchNorm2d(8, momentum=None))
def norm_of_cumulative_average(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.norm(self.conv(x))))


@net(KIND, norm=lambda: nn.BatchNorm2d(8, track_running_stats=False), verdict=REFUSED, says="norm")
def norm_without_statistics(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.norm(self.conv(x))))


@net(KIND)
def norm_behind_a_permuted_layer(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.conv(x).transpose(2, 3))))


@net(KIND, odd=lambda: nn.Conv2d(8, 8, (1, 5), (2, 1), (0, 2), groups=4, bias=False))
def oblong_grouped_convolution(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.odd(self.relu(self.conv(x))))))


@net(KIND, a=lambda: nn.Linear(8, 6), b=lambda: nn.Linear(6, 5))
def two_linears_without_activation(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(self.pool(self.relu(self.conv(x))).flatten(1)))


@net(KIND, one=lambda: nn.Conv1d(8, 5, 1))
def convolution_of_one_axis(self: Any, x: Tensor) -> Tensor:
    return self.one(self.relu(self.conv(x)).flatten(2)).mean(2)


@net(KIND, cube=lambda: nn.Conv3d(1, 2, 1), verdict="refused", says="cube")
def convolution_of_three_axes(self: Any, x: Tensor) -> Tensor:
    return self.head(self.cube(self.relu(self.conv(x)).unsqueeze(1)).sum(1))
