"""Arithmetic with constants and learned factors, differences, and normalization inside the net."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "scales"


@net(KIND, is_fast=True)
def scaled_branch(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y + 0.2 * self.conv2(y))


@net(KIND)
def scaled_branch_from_the_right(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv2(y) * 0.2 + y)


@net(KIND)
def scaled_rectified_branch(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(y + 0.3 * F.relu(self.conv2(y)))


@net(KIND)
def negatively_scaled_rectified_branch(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(F.relu(y + -0.7 * F.relu(self.conv2(y))))


@net(KIND)
def average_of_two(self: Any, x: Tensor) -> Tensor:
    return self.head((self.relu(self.conv(x)) + self.side(x)) / 2)


@net(KIND)
def average_of_two_then_relu(self: Any, x: Tensor) -> Tensor:
    return self.head(F.relu((self.conv(x) + self.side(x)) / 2.0))


@net(KIND)
def half_each(self: Any, x: Tensor) -> Tensor:
    return self.head(0.5 * self.conv(x) + 0.5 * self.relu(self.side(x)))


@net(KIND)
def add_with_alpha_argument(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(torch.add(y, self.conv2(y), alpha=0.3))


@net(KIND)
def sub_with_alpha_argument(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(torch.sub(y, self.conv2(y), alpha=2))


@net(KIND, is_fast=True, gamma=lambda: nn.Parameter(torch.randn(8, 1, 1)))
def layer_scale(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y + self.gamma * self.conv2(y))


@net(KIND, gamma=lambda: nn.Parameter(torch.randn(1, 8, 1, 1)))
def layer_scale_of_four_axes(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y + self.conv2(y) * self.gamma)


@net(KIND, gamma=lambda: nn.Parameter(torch.randn(8)))
def layer_scale_viewed(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y + self.conv2(y) * self.gamma.view(1, -1, 1, 1))


@net(KIND, gamma=lambda: nn.Parameter(torch.randn(8)))
def layer_scale_indexed(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y + self.conv2(y) * self.gamma[None, :, None, None])


@net(KIND, gamma=lambda: nn.Parameter(torch.randn(8)))
def layer_scale_channels_last(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    z = (self.conv2(y).permute(0, 2, 3, 1) * self.gamma).permute(0, 3, 1, 2)
    return self.head(y + z)


@net(KIND, alpha=lambda: nn.Parameter(torch.tensor(0.4)))
def learned_scalar(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y + self.alpha * self.conv2(y))


@net(KIND, alpha=lambda: nn.Parameter(torch.tensor([0.4])))
def learned_scalar_of_one_axis(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.alpha * y + (1 - self.alpha) * self.conv2(y))


@net(KIND, alpha=lambda: nn.Parameter(torch.tensor(0.4)))
def rezero_on_a_rectified_value(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(y + self.alpha * F.relu(self.conv2(y)))


@net(KIND, weights=lambda: nn.Parameter(torch.rand(2)))
def fusion_of_weights(self: Any, x: Tensor) -> Tensor:
    w = F.relu(self.weights)
    w = w / (w.sum() + 1e-4)
    return self.head(w[0] * self.conv(x) + w[1] * self.side(x))


@net(KIND, offset=lambda: nn.Parameter(torch.randn(1, 8, 1, 1)))
def learned_offset(self: Any, x: Tensor) -> Tensor:
    return self.head(F.relu(self.conv(x) + self.offset))


@net(KIND, offset=lambda: nn.Parameter(torch.randn(8, 8, 8) * 0.3))
def learned_offset_of_each_place(self: Any, x: Tensor) -> Tensor:
    return self.head(F.relu(self.conv(x) + self.offset))


@net(KIND, is_fast=True)
def difference(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x)) - self.relu(self.side(x)))


@net(KIND)
def difference_then_relu(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv3(F.relu(y - self.conv2(y))))


@net(KIND)
def difference_from_the_mean(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(F.relu(y - self.pool(y)))


@net(KIND)
def negation(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(self.wide(torch.cat([F.relu(y), F.relu(-y)], 1)))


@net(KIND)
def negation_spellings(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(torch.neg(y) + self.conv2(y).neg())


@net(KIND)
def one_minus_sigmoid(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    gate = torch.sigmoid(self.side(x))
    return self.head(gate * y + (1 - gate) * self.conv2(y))


@net(KIND)
def one_minus_sigmoid_rsub(self: Any, x: Tensor) -> Tensor:
    gate = torch.rsub(torch.sigmoid(self.side(x)), 1.0)
    return self.head(self.conv(x) * gate)


@net(KIND)
def constant_added(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv2(y + 0.5))


@net(KIND)
def constant_subtracted_after_relu(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)) - 0.5
    return self.head(self.conv2(y) + y)


@net(KIND)
def relu_scaled_and_shifted(self: Any, x: Tensor) -> Tensor:
    y = 1.7 * F.relu(self.conv(x)) - 0.6
    return self.head(self.conv2(F.relu(y)))


@net(KIND)
def divided_by_constant(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.div(self.relu(self.conv(x)), 3.0))


@net(KIND, scale=lambda: torch.tensor([0.5, 2.0, -1.0, 0.3, 1.1, -0.4, 0.9, 1.5]).view(1, 8, 1, 1))
def scale_from_a_buffer(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.conv2(y * self.scale))


@net(KIND)
def images_to_minus_one_and_one(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(2 * x - 1)))


@net(KIND, is_fast=True, mean=lambda: torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1),
     std=lambda: torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))  # fmt: skip
def images_normalized(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv((x - self.mean) / self.std)))


@net(KIND, mean=lambda: torch.tensor([0.5, 0.4, 0.3]), std=lambda: torch.tensor([0.2, 0.3, 0.25]))
def images_normalized_by_views(self: Any, x: Tensor) -> Tensor:
    x = x.sub(self.mean[:, None, None]).div(self.std[:, None, None])
    return self.head(self.relu(self.conv(x)))


@net(KIND)
def images_normalized_channel_by_channel(self: Any, x: Tensor) -> Tensor:
    r = torch.unsqueeze(x[:, 0], 1) * (0.229 / 0.5) + (0.485 - 0.5) / 0.5
    g = torch.unsqueeze(x[:, 1], 1) * (0.224 / 0.5) + (0.456 - 0.5) / 0.5
    b = torch.unsqueeze(x[:, 2], 1) * (0.225 / 0.5) + (0.406 - 0.5) / 0.5
    return self.head(self.relu(self.conv(torch.cat((r, g, b), 1))))


@net(KIND, norm=lambda: nn.BatchNorm2d(3))
def batch_norm_on_images(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(self.norm(x))))


@net(KIND)
def sum_of_three(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(F.relu(y + self.conv2(y) + self.side(x)))


@net(KIND)
def norm_after_a_sum(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(self.relu(self.bn(y + self.conv2(y))))


@net(KIND)
def scale_on_logits(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x))) * 0.1


@net(KIND)
def temperature_and_offset_on_logits(self: Any, x: Tensor) -> Tensor:
    return (self.head(self.relu(self.conv(x))) - 0.2) / 4.0


@net(KIND)
def scale_shared_by_two_readers(self: Any, x: Tensor) -> Tensor:
    y = 0.3 * self.conv(x)
    return self.head(self.relu(self.conv2(y)) + y)


@net(KIND)
def layer_read_with_and_without_scale(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(self.conv2(0.3 * y) + y)


@net(KIND)
def scale_between_layer_and_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(F.relu(self.bn(self.conv(x) * 1.5 + 0.2)))


@net(KIND)
def scale_in_front_of_a_padded_layer(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x)) * 0.5 + 1.0
    return self.head(self.conv2(y))  # the padding is zero, not the offset


@net(KIND)
def square_root_of_two(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head((y + self.conv2(y)) * (2**-0.5))


@net(KIND)
def gate_around_one(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y * (1 + torch.tanh(self.side(x))))


@net(KIND, verdict=REFUSED, says="mul|div")
def quotient_of_two(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv(x) / (1 + torch.sigmoid(self.side(x))))
