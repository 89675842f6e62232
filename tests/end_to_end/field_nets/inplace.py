"""Operations in place: whoever reads later, also through another name or a view, reads the new value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import net

KIND = "in place"
RELU = {"act": lambda: nn.ReLU(inplace=True)}


@net(KIND, is_fast=True, **RELU)
def relu_module_then_skip(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    skip = y
    z = self.act(y)
    return self.head(self.conv2(z) + skip)


@net(KIND)
def relu_function_then_skip(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = F.relu(y, inplace=True)
    return self.head(self.conv2(z) + y)


@net(KIND)
def relu_method_result_unused(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    y.relu_()
    return self.head(self.conv2(y))


@net(KIND)
def torch_relu_then_skip(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    z = torch.relu_(y)
    return self.head(self.conv2(z) + y)


@net(KIND, **RELU)
def module_result_unused(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    self.act(y)
    return self.head(self.conv2(y) + y)


@net(KIND, **RELU)
def preactivation_skip_is_rectified(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    y = self.conv2(self.act(self.bn(x)))
    return self.head(x + y)


@net(KIND, **RELU)
def preactivation_without_norm(self: Any, x: Tensor) -> Tensor:
    x = self.conv(x)
    y = self.conv2(self.act(x))
    return self.head(x + y)


@net(KIND, is_fast=True)
def iadd_then_old_name(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    old = y
    y += self.conv2(y)
    return self.head(self.conv3(y) + old)


@net(KIND)
def add_method_then_old_name(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.conv2(y)
    y.add_(z)
    return self.head(self.conv3(self.relu(y)) + y)


@net(KIND)
def mul_method_then_old_name(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    gate = torch.sigmoid(self.conv2(y))
    old = y
    y.mul_(gate)
    return self.head(self.conv3(y) + old)


@net(KIND)
def imul_by_gate(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    old = y
    y *= torch.sigmoid(self.conv2(y))
    return self.head(old)


@net(KIND)
def add_with_alpha(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.relu(self.conv2(y))
    y.add_(z, alpha=0.5)
    return self.head(y)


@net(KIND)
def mul_by_constant(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = y
    y.mul_(0.5)
    return self.head(self.conv2(z))


@net(KIND)
def div_and_sub(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    z = self.conv2(y)
    y.div_(2.0)
    z.sub_(y)
    return self.head(z)


@net(KIND)
def clamp_then_skip(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y.clamp_(0, 1)
    return self.head(self.conv2(y) + y)


@net(KIND, act=lambda: nn.SiLU(inplace=True))
def silu_then_skip(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.act(y)
    return self.head(self.conv2(z) + y)


@net(KIND, act=lambda: nn.Hardswish(inplace=True))
def hardswish_then_skip(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.act(y)
    return self.head(self.conv2(z) + y)


@net(KIND, act=lambda: nn.LeakyReLU(0.2, inplace=True))
def leaky_then_skip(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.act(y)
    return self.head(self.conv2(z) + y)


@net(KIND)
def through_reshape(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    view = y.view(y.size(0), -1)
    F.relu_(view)
    return self.head(self.conv2(y))


@net(KIND)
def through_flatten(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y.flatten(2).relu_()
    return self.head(self.conv2(y) + y)


@net(KIND)
def through_transpose(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y.transpose(2, 3).relu_()
    return self.head(self.conv2(y))


@net(KIND, is_fast=True)
def through_channel_slice(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[:, :4].relu_()
    return self.head(self.conv2(y))


@net(KIND)
def through_narrow(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    a, b = y.narrow(1, 0, 4), y.narrow(1, 4, 4)
    a.relu_()
    return self.head(self.conv2(y) + torch.cat([b, a], 1))


@net(KIND)
def set_item_relu(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[:, 4:] = F.relu(y[:, 4:])
    return self.head(self.conv2(y))


@net(KIND)
def set_item_zero(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y[:, :, 0] = 0
    return self.head(self.conv2(y))


@net(KIND)
def slices_read_after_base_was_written(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    a, b = y[:, :4], y[:, 4:]
    y.relu_()
    return self.head(self.narrow(a) + torch.cat([b, b], 1))


@net(KIND)
def view_before_write_of_base(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    flat = y.flatten(2)
    F.relu(y, inplace=True)
    return self.head(flat.view(y.shape))


@net(KIND)
def copy_is_not_touched(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    skip = y.clone()
    y.relu_()
    return self.head(self.conv2(y) + skip)


@net(KIND)
def detach_shares_storage(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    F.relu(y, inplace=True)
    z = y.contiguous()
    z.add_(self.conv2(z))
    return self.head(y)


@net(KIND, **RELU)
def identity_and_dropout_are_aliases(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = F.dropout(y, 0.5, False)
    self.act(z)
    return self.head(self.conv2(y) + y)


@net(KIND, act=lambda: nn.ReLU(inplace=True), none=nn.Identity)
def identity_module_is_an_alias(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = self.none(y)
    self.act(z)
    return self.head(self.conv2(y) + y)


@net(KIND)
def the_images_are_written(self: Any, x: Tensor) -> Tensor:
    y = x.clone()
    y.mul_(2.0)
    return self.head(self.relu(self.conv(y)) + self.side(x))


@net(KIND)
def the_input_itself_is_rectified(self: Any, x: Tensor) -> Tensor:
    a = self.conv(x)
    F.relu(x, inplace=True)
    return self.head(self.relu(a) + self.side(x))


@net(KIND)
def chain_of_writes(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    first = y
    y.relu_()
    y += self.conv2(y)
    y.relu_()
    return self.head(self.conv3(first) + y)


@net(KIND)
def sum_then_relu_in_place(self: Any, x: Tensor) -> Tensor:
    a = self.conv(x)
    out = self.conv2(F.relu(a))
    out += a
    F.relu(out, inplace=True)
    return self.head(out + a)


@net(KIND, is_fast=True)
def threshold_function(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    z = F.threshold_(y, 0.0, 0.0)
    return self.head(self.conv2(z) + y)


@net(KIND, act=lambda: nn.ReLU(inplace=True))
def shared_relu_of_many_calls(self: Any, x: Tensor) -> Tensor:
    y = self.act(self.bn(self.conv(x)))
    z = self.act(self.bn2(self.conv2(y)))
    return self.head(self.act(z + y))


@net(KIND)
def unsqueeze_squeeze_is_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y.unsqueeze(1).squeeze(1).relu_()
    return self.head(self.conv2(y))


@net(KIND)
def pooled_then_written(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    s = self.pool(y)
    y.mul_(torch.sigmoid(s))
    return self.head(self.conv2(y) + s)
