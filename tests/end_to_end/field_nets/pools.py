"""Pools and means: windows that reach over the border, means that equal a pool, maxima, squeeze and excitation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "pools"
ODD = (3, 7, 7)


def _average(name: str, shape: tuple[int, int, int], *args: Any, signed: bool = False, **options: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head(self.window(y if self.signed else F.relu(y)))

    forward.__name__ = name
    parts = {"window": lambda: nn.AvgPool2d(*args, **options), "signed": lambda: signed}
    net(KIND, shape=shape, is_fast=name.endswith("beyond_the_end"), **parts)(forward)


_average("average", ODD, 2)
_average("average_ceil", ODD, 2, ceil_mode=True)
_average("average_ceil_signed", ODD, 2, ceil_mode=True, signed=True)
_average("average_padded", ODD, 3, 2, 1)
_average("average_padded_signed", ODD, 3, 2, 1, signed=True)
_average("average_padded_without_padding_in_the_mean", ODD, 3, 2, 1, count_include_pad=False)
_average("average_padded_without_padding_signed", ODD, 3, 2, 1, count_include_pad=False, signed=True)
_average("average_ceil_padded_beyond_the_end", ODD, 2, 2, 1, ceil_mode=True)
_average("average_ceil_padded_signed_beyond_the_end", ODD, 2, 2, 1, ceil_mode=True, signed=True)
_average("average_ceil_padded_uncounted", ODD, 3, 2, 1, ceil_mode=True, count_include_pad=False)
_average("average_ceil_padded_even", (3, 8, 8), 3, 2, 1, ceil_mode=True)
_average("average_divisor", ODD, 2, divisor_override=3)
_average("average_oblong", (3, 8, 7), (2, 3), (1, 2), (1, 0))


@net(KIND, shape=ODD, window=lambda: nn.MaxPool2d(2, 2, 1, ceil_mode=True))
def max_ceil_padded(self: Any, x: Tensor) -> Tensor:
    return self.head(self.window(self.conv(x)))


@net(KIND, shape=ODD, window=lambda: nn.MaxPool2d(3, 2, ceil_mode=True))
def max_ceil(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.window(self.relu(self.conv(x)))))


@net(KIND, window=lambda: nn.MaxPool2d(3, 1, 1, dilation=2))
def max_dilated(self: Any, x: Tensor) -> Tensor:
    return self.head(self.window(self.conv(x)))


@net(KIND, window=lambda: nn.MaxPool2d(2))
def max_then_relu(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.relu(self.window(self.conv(x)))))


@net(KIND, window=lambda: nn.MaxPool2d(3, 2, 1), is_fast=True)
def max_then_relu_beside_a_signed_branch(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.window(self.conv(x)))
    return self.head(self.wide(torch.cat([y, self.window(self.side(x))], 1)))


@net(KIND)
def mean_of_both_axes(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x)).mean([2, 3]))


@net(KIND)
def mean_from_the_end(self: Any, x: Tensor) -> Tensor:
    return self.fc(torch.mean(self.relu(self.conv(x)), dim=(-1, -2)))


@net(KIND)
def mean_of_means(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x)).mean(3).mean(2))


@net(KIND)
def mean_of_means_from_the_end(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.conv(x).mean(-1).mean(-1))


@net(KIND)
def mean_kept_and_convolved(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y * torch.sigmoid(self.conv2(y.mean((2, 3), keepdim=True))))


@net(KIND)
def mean_of_flattened(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x)).flatten(2).mean(-1))


@net(KIND)
def mean_of_one_axis(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y * torch.sigmoid(self.conv2(y.mean(3, keepdim=True))))


@net(KIND)
def mean_behind_view(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc(y.view(y.size(0), y.size(1), -1).mean(dim=2))


@net(KIND)
def sum_of_space(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x)).sum((2, 3)) / 20)


@net(KIND)
def sum_over_size(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc(y.sum(dim=[2, 3]) / (y.size(2) * y.size(3)))


@net(KIND)
def maximum_of_space(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.conv(x).amax((2, 3)))


@net(KIND)
def maximum_in_two_steps(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.relu(self.conv(x)).max(3)[0].max(dim=2).values)


@net(KIND)
def average_and_maximum(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc((F.adaptive_avg_pool2d(y, 1) + F.adaptive_max_pool2d(y, 1)).flatten(1))


@net(KIND, window=lambda: nn.AdaptiveMaxPool2d(1), is_fast=True)
def adaptive_maximum(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.window(self.conv(x)).flatten(1))


@net(KIND, window=lambda: nn.AdaptiveMaxPool2d((3, 2)))
def adaptive_maximum_uneven(self: Any, x: Tensor) -> Tensor:
    return self.head(self.window(self.conv(x)))


@net(KIND, window=lambda: nn.AdaptiveAvgPool2d((3, 5)))
def adaptive_average_uneven(self: Any, x: Tensor) -> Tensor:
    return self.head(self.window(self.relu(self.conv(x))))


@net(KIND, window=lambda: nn.AdaptiveAvgPool2d((None, 1)))
def adaptive_average_of_one_axis(self: Any, x: Tensor) -> Tensor:
    return self.head(self.window(self.relu(self.conv(x))))


@net(KIND, window=lambda: nn.AdaptiveAvgPool2d(16))
def adaptive_average_that_grows(self: Any, x: Tensor) -> Tensor:
    return self.head(self.window(self.conv(x)))


@net(KIND)
def average_between_conv_and_relu(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.relu(F.avg_pool2d(self.conv(x), 2))))


@net(KIND)
def minus_max_of_minus(self: Any, x: Tensor) -> Tensor:
    return self.head(-F.max_pool2d(-self.conv(x), 2))


@net(KIND, verdict=REFUSED, says="max")
def maximum_of_two(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.max(self.conv(x), self.side(x)))


@net(KIND, spatial=lambda: nn.Conv2d(2, 1, 3, padding=1))
def maximum_over_channels(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    gate = torch.sigmoid(self.spatial(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)))
    return self.head(y * gate)


@net(KIND, verdict=REFUSED, window=lambda: nn.LPPool2d(2, 2), says="window|lp|pow")
def power_pool(self: Any, x: Tensor) -> Tensor:
    return self.head(self.window(self.relu(self.conv(x))))


@net(KIND)
def maximum_with_indices(self: Any, x: Tensor) -> Tensor:
    y, _ = F.max_pool2d(self.conv(x), 2, return_indices=True)
    return self.head(y)


@net("excitation", is_fast=True, a=lambda: nn.Linear(8, 4), b=lambda: nn.Linear(4, 8))
def expanded_as(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    b, c, _, _ = y.size()
    s = self.pool(y).view(b, c)
    s = torch.sigmoid(self.b(F.relu(self.a(s)))).view(b, c, 1, 1)
    return self.head(y * s.expand_as(y))


@net("excitation", a=lambda: nn.Linear(8, 4), b=lambda: nn.Linear(4, 8))
def expanded_by_sizes(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    s = F.hardsigmoid(self.b(F.relu(self.a(y.mean((2, 3))))))
    return self.head(y * s[:, :, None, None].expand(-1, -1, y.size(2), y.size(3)))


@net("excitation", a=lambda: nn.Linear(8, 4), b=lambda: nn.Linear(4, 8))
def unsqueezed_and_broadcast(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    s = self.b(F.relu(self.a(self.pool(y).flatten(1)))).sigmoid().unsqueeze(-1).unsqueeze(-1)
    return self.head(F.relu(s * y))


@net("excitation", a=lambda: nn.Conv2d(8, 2, 1), b=lambda: nn.Conv2d(2, 8, 1))
def by_convolutions_and_hand_written_gate(self: Any, x: Tensor) -> Tensor:
    y = F.hardswish(self.conv(x))
    s = F.relu6(self.b(F.relu(self.a(self.pool(y)))) + 3.0) / 6.0
    return self.head(y * s)


@net("excitation", eca=lambda: nn.Conv1d(1, 1, 3, padding=1, bias=False))
def efficient_channel_attention(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    s = self.eca(self.pool(y).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
    return self.head(y * torch.sigmoid(s).expand_as(y))


@net("excitation")
def residual_gate(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y * torch.sigmoid(self.conv2(self.pool(y))) + y)


@net(KIND, out=lambda: nn.Linear(16, 5))
def maximum_over_images_without_channels(self: Any, x: Tensor) -> Tensor:
    return self.out(F.max_pool2d(self.conv(x).mean(1), (2, 2)).flatten(1))


@net(KIND, out=lambda: nn.Linear(12, 5))
def oblong_maximum_over_images_without_channels(self: Any, x: Tensor) -> Tensor:
    return self.out(F.max_pool2d(self.conv(x).mean(1), (3, 2), (2, 3), (1, 0)).flatten(1))


@net(KIND, out=lambda: nn.Linear(16, 5))
def average_over_images_without_channels(self: Any, x: Tensor) -> Tensor:
    return self.out(F.avg_pool2d(self.relu(self.conv(x))[:, 0], 2).flatten(1))


@net(KIND, out=lambda: nn.Linear(8, 5))
def adaptive_average_over_images_without_channels(self: Any, x: Tensor) -> Tensor:
    return self.out(F.adaptive_avg_pool2d(self.relu(self.conv(x))[:, 0], (4, 2)).flatten(1))


@net(KIND, out=lambda: nn.Linear(32, 5))
def maximum_and_average_over_sequences(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)).flatten(2)
    return self.out(F.adaptive_avg_pool1d(F.avg_pool1d(F.max_pool1d(y, 3, 2, 1), 2), 4).flatten(1))
