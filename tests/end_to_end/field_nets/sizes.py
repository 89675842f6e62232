"""Shapes asked of tensors: windows, views, conditions and asserts on sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "sizes"


@net(KIND, is_fast=True)
def pool_by_size_of_axis(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    y = F.avg_pool2d(y, y.size()[3])
    return self.fc(y.view(y.size(0), -1))


@net(KIND)
def pool_by_two_sizes(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc(F.avg_pool2d(y, y.size()[2:]).flatten(1))


@net(KIND)
def pool_by_shape(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc(F.avg_pool2d(y, kernel_size=y.shape[2:]).flatten(1))


@net(KIND)
def pool_by_shape_of_each(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc(F.avg_pool2d(y, (y.shape[-2], y.shape[-1])).flatten(1))


@net(KIND)
def max_pool_by_size(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.fc(F.max_pool2d(y, y.size()[2:]).flatten(1))


@net(KIND)
def max_pool_by_size_keyword(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc(F.max_pool2d(y, kernel_size=y.size(3)).view(y.size(0), 8))


@net(KIND)
def half_of_the_size(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(F.avg_pool2d(y, y.size(2) // 2))


@net(KIND)
def int_of_a_quotient(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(F.avg_pool2d(y, int(y.shape[2] / 4)))


@net(KIND)
def unpacked_shape(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    b, c, h, w = y.shape
    return self.fc(y.view(b, c, h * w).mean(2))


@net(KIND)
def unpacked_size_shuffle(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    b, c, h, w = y.size()
    y = y.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
    return self.head(self.conv2(y))


@net(KIND)
def star_of_sizes(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y.reshape(y.shape[0], 8, -1).reshape(-1, 8, *x.shape[2:]))


@net(KIND)
def view_of_product(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.relu(self.conv(x)))
    return self.fc(y.view(-1, y.size(1) * y.size(2) * y.size(3)))


@net(KIND)
def number_of_features_helper(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.relu(self.conv(x)))
    features = 1
    for size in y.size()[1:]:
        features *= size
    return self.fc(y.view(-1, features))


@net(KIND, is_fast=True)
def condition_on_channels(self: Any, x: Tensor) -> Tensor:
    if x.size(1) == 1:
        x = torch.cat([x, x, x], 1)
    return self.head(self.relu(self.conv(x)))


@net(KIND)
def condition_on_spatial_size(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    if y.shape[2] > 4 and y.shape[-1] % 2 == 0:
        y = F.max_pool2d(y, 2)
    return self.head(y)


@net(KIND)
def condition_on_equal_shapes(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.conv(x))
    b = self.conv2(a)
    return self.head(a + b if a.shape == b.shape else b)


@net(KIND)
def loop_while_large(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    while y.size(-1) > 2:
        y = F.max_pool2d(y, 2)
    return self.head(y)


@net(KIND)
def asserts_of_shapes(self: Any, x: Tensor) -> Tensor:
    assert x.dim() == 4 and x.shape[1] == 3, f"images expected, got {x.shape}"
    assert x.ndim == 4, "not a batch"
    b, _, h, w = x.shape
    torch._assert(h == w, "square images")
    y = self.relu(self.conv(x))
    assert y.shape == (b, 8, h, w)
    return self.head(y)


@net(KIND)
def raise_on_wrong_shape(self: Any, x: Tensor) -> Tensor:
    if x.dim() != 4:
        raise ValueError(f"4-d wanted, {x.dim()}-d given")
    return self.head(self.relu(self.conv(x)))


@net(KIND)
def size_with_negative_axis(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.fc(F.avg_pool2d(y, y.size(-1)).flatten(start_dim=1))


@net(KIND)
def len_of_the_batch(self: Any, x: Tensor) -> Tensor:
    y = self.pool(self.relu(self.conv(x)))
    return self.fc(y.reshape(len(x), -1))


@net(KIND)
def same_padding_computed(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    h = y.shape[-1]
    pad = max((-(-h // 2) - 1) * 2 + 3 - h, 0)
    y = F.pad(y, [pad // 2, pad - pad // 2, pad // 2, pad - pad // 2])
    return self.head(F.conv2d(y, self.conv2.weight, self.conv2.bias, 2))


@net(KIND)
def pool_to_the_size_of_another(self: Any, x: Tensor) -> Tensor:
    a = self.down(self.relu(self.conv(x)))
    b = F.adaptive_avg_pool2d(self.relu(self.side(x)), a.shape[-2:])
    return self.head(a + b)


@net(KIND, is_fast=True)
def squeeze_all(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.pool(self.relu(self.conv(x))).squeeze())


@net(KIND)
def squeeze_twice(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.pool(self.relu(self.conv(x))).squeeze(3).squeeze(2))


@net(KIND)
def squeeze_from_the_end(self: Any, x: Tensor) -> Tensor:
    return self.fc(self.pool(self.relu(self.conv(x))).squeeze(-1).squeeze(-1))


@net(KIND)
def squeeze_function(self: Any, x: Tensor) -> Tensor:
    return self.fc(torch.squeeze(F.adaptive_avg_pool2d(self.relu(self.conv(x)), 1)))


@net(KIND)
def squeeze_of_tuple(self: Any, x: Tensor) -> Tensor:
    return self.fc(torch.squeeze(self.pool(self.relu(self.conv(x))), dim=(2, 3)))


@net(KIND)
def squeeze_that_does_nothing(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x)).squeeze(1))


@net(KIND, final=lambda: nn.Conv2d(8, 5, 1))
def squeeze_at_the_end(self: Any, x: Tensor) -> Tensor:
    return self.final(self.pool(self.relu(self.conv(x)))).squeeze()


@net(KIND, verdict=REFUSED, says=r"sizes\.py|value|condition")
def condition_on_values(self: Any, x: Tensor) -> Tensor:
    if x.sum() > 0:
        x = -x
    return self.head(self.relu(self.conv(x)))


@net(KIND, verdict=REFUSED, says=r"sizes\.py|item|value")
def number_from_values(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y * float(y.mean()))


@net(KIND, verdict=REFUSED, says=r"batch|sizes\.py")
def condition_on_the_batch(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    if x.size(0) > 2:
        y = self.conv2(y)
    return self.head(y)


@net(KIND, verdict=REFUSED, is_fast=True, says="images")
def condition_on_a_large_batch(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y * 2 if x.shape[0] > 16 else y)


@net(KIND, verdict=REFUSED, says="batch")
def at_most_four_images(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.conv(x[:4])))


@net(KIND, verdict=REFUSED, says=r"batch|sizes\.py|div")
def scale_by_the_batch(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y / x.size(0))


@net(KIND, verdict=REFUSED, says=r"batch|view|reshape")
def batch_and_channels_mixed(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    b, c, h, w = y.shape
    y = F.max_pool2d(y.view(b * c, 1, h, w), 2)
    return self.head(y.view(b, c, h // 2, w // 2))


@net(KIND, verdict=REFUSED, says=r"mean|batch|var")
def mean_over_the_batch(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(y - y.mean(0, keepdim=True))
