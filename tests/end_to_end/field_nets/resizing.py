"""Maps of another size: zero padding in all spellings, crops, nearest interpolation, transposed convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND, UPSAMPLING = "padding", "upsampling"


def _bare(stride: int = 1) -> Any:
    return lambda: nn.Conv2d(8, 8, 3, stride)


@net(KIND, is_fast=True, bare=_bare())
def pad_function(self: Any, x: Tensor) -> Tensor:
    return self.head(self.bare(F.pad(self.relu(self.conv(x)), (1, 1, 1, 1))))


@net(KIND, bare=_bare(2))
def pad_on_one_side(self: Any, x: Tensor) -> Tensor:
    return self.head(self.bare(F.pad(self.relu(self.conv(x)), (0, 1, 0, 1), "constant", 0)))


@net(KIND, bare=_bare(), pad=lambda: nn.ZeroPad2d(1))
def pad_module(self: Any, x: Tensor) -> Tensor:
    return self.head(self.bare(self.pad(self.relu(self.conv(x)))))


@net(KIND, bare=_bare(), pad=lambda: nn.ZeroPad2d((1, 0, 2, 1)))
def pad_module_uneven(self: Any, x: Tensor) -> Tensor:
    return self.head(self.bare(self.pad(self.conv(x))))


@net(KIND, bare=_bare(), pad=lambda: nn.ConstantPad2d(1, 0.0))
def constant_pad_module_of_zero(self: Any, x: Tensor) -> Tensor:
    return self.head(self.bare(self.pad(self.relu(self.conv(x)))))


@net(KIND, first=lambda: nn.Conv2d(3, 8, 3))
def pad_of_the_image(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.first(F.pad(x, [1, 1, 1, 1]))))


@net(KIND)
def pad_in_front_of_a_pool(self: Any, x: Tensor) -> Tensor:
    return self.head(F.max_pool2d(F.pad(self.conv(x), (0, 1, 0, 1)), 3, 2))


@net(KIND)
def pad_in_front_of_an_average(self: Any, x: Tensor) -> Tensor:
    return self.head(F.avg_pool2d(F.pad(self.relu(self.conv(x)), (1, 1, 1, 1)), 3, 2))


@net(KIND)
def pad_that_crops(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.pad(self.relu(self.conv(x)), (-1, -1, -1, -2))))


@net(KIND)
def pad_and_crop(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.pad(self.relu(self.conv(x)), (-1, 2, 1, -1))))


@net(KIND)
def pad_between_signed_and_sum(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    return self.head(F.pad(self.conv2(y)[:, :, 1:-1, 1:-1], (1, 1, 1, 1)) + y)


@net(KIND)
def pad_behind_a_sigmoid(self: Any, x: Tensor) -> Tensor:
    y = F.pad(torch.sigmoid(self.conv(x)), (1, 1, 1, 1))
    return self.head(self.conv2(y))


@net(KIND)
def pad_behind_a_silu(self: Any, x: Tensor) -> Tensor:
    y = F.pad(F.silu(self.conv(x)), (2, 1, 0, 1))
    return self.head(self.conv2(y))


@net(KIND, same=lambda: nn.Conv2d(8, 8, 3, padding="same"), is_fast=True)
def same_convolution(self: Any, x: Tensor) -> Tensor:
    return self.head(self.same(self.relu(self.conv(x))))


@net(KIND, same=lambda: nn.Conv2d(8, 8, 4, padding="same", dilation=1))
def same_convolution_of_even_kernel(self: Any, x: Tensor) -> Tensor:
    return self.head(self.same(self.relu(self.conv(x))))


@net(KIND, same=lambda: nn.Conv2d(8, 8, (3, 2), padding="same", dilation=(1, 3)))
def same_convolution_dilated(self: Any, x: Tensor) -> Tensor:
    return self.head(self.same(self.conv(x)))


@net(KIND, valid=lambda: nn.Conv2d(8, 8, 3, padding="valid"))
def valid_convolution(self: Any, x: Tensor) -> Tensor:
    return self.head(self.valid(self.relu(self.conv(x))))


@net(KIND, is_fast=True, grow=lambda: nn.Conv2d(8, 16, 3, 2, 1), last=lambda: nn.Linear(16, 5))
def option_a_shortcut(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    short = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
    return self.last(self.pool(F.relu(self.grow(y) + short)).flatten(1))


@net(KIND, grow=lambda: nn.Conv2d(8, 16, 3, 2, 1), last=lambda: nn.Linear(16, 5))
def option_a_shortcut_by_pool_and_zeros(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    short = F.avg_pool2d(y, 1, 2)
    short = torch.cat((short, short.mul(0)), 1)
    return self.last(self.pool(F.relu(self.grow(y) + short)).flatten(1))


@net(KIND, grow=lambda: nn.Conv2d(8, 16, 3, 2, 1), last=lambda: nn.Linear(16, 5))
def option_a_shortcut_by_new_zeros(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    short = F.avg_pool2d(y, 2)
    zeros = torch.zeros(short.size(0), 8, short.size(2), short.size(3), device=short.device)
    return self.last(self.pool(F.relu(self.grow(y) + torch.cat([short, zeros], 1))).flatten(1))


@net(KIND)
def pad_of_channels(self: Any, x: Tensor) -> Tensor:
    y = F.pad(self.conv(x)[:, :4], (0, 0, 0, 0, 1, 3))
    return self.head(self.conv2(y))


@net(KIND, verdict=REFUSED, says="pad")
def pad_with_another_value(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.pad(self.relu(self.conv(x)), (1, 1, 1, 1), value=1.0)))


@net(KIND, verdict=REFUSED, says="pad")
def pad_with_minus_infinity(self: Any, x: Tensor) -> Tensor:
    return self.head(F.max_pool2d(F.pad(self.conv(x), (1, 1, 1, 1), value=float("-inf")), 3, 2))


@net(KIND, verdict=REFUSED, pad=lambda: nn.ReflectionPad2d(1), says="pad")
def reflection(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.pad(self.relu(self.conv(x)))))


@net(KIND, verdict=REFUSED, says="pad")
def replication(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(F.pad(self.relu(self.conv(x)), (1, 1, 1, 1), mode="replicate")))


@net(KIND, verdict=REFUSED, odd=lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), says="odd")
def reflection_in_a_layer(self: Any, x: Tensor) -> Tensor:
    return self.head(self.odd(self.relu(self.conv(x))))


@net(KIND, verdict=REFUSED, odd=lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), is_fast=True,
     says="odd: padding mode 'circular'.*use zeros")  # fmt: skip
def circular_in_a_layer(self: Any, x: Tensor) -> Tensor:
    return self.head(self.odd(self.relu(self.conv(x))))


@net(KIND, verdict=REFUSED, says="padding mode 'circular'.*use zeros")
def circular_function(self: Any, x: Tensor) -> Tensor:
    return self.head(F.pad(self.relu(self.conv(x)), (1, 1, 0, 1), mode="circular"))


@net(UPSAMPLING, is_fast=True, up=lambda: nn.Upsample(scale_factor=2))
def nearest_module(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.up(self.relu(self.conv(x)))))


@net(UPSAMPLING, up=lambda: nn.UpsamplingNearest2d(scale_factor=2))
def nearest_old_module(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.up(self.conv(x))))


@net(UPSAMPLING)
def nearest_by_scale(self: Any, x: Tensor) -> Tensor:
    y = F.interpolate(self.relu(self.conv(x)), scale_factor=2, mode="nearest")
    return self.head(self.conv2(y))


@net(UPSAMPLING)
def nearest_by_uneven_scale(self: Any, x: Tensor) -> Tensor:
    y = F.interpolate(self.relu(self.conv(x)), scale_factor=(1.5, 0.7))
    return self.head(self.conv2(y))


@net(UPSAMPLING)
def nearest_by_size_of_another(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.conv(x))
    b = self.relu(self.down(a))
    return self.head(a + F.interpolate(b, size=a.shape[2:], mode="nearest"))


@net(UPSAMPLING)
def nearest_exact(self: Any, x: Tensor) -> Tensor:
    y = F.interpolate(self.relu(self.conv(x)), size=(11, 5), mode="nearest-exact")
    return self.head(self.conv2(y))


@net(UPSAMPLING)
def nearest_odd_size(self: Any, x: Tensor) -> Tensor:
    return self.head(F.interpolate(self.conv(x), (13, 6)))


def _transposed(name: str, *args: Any, **options: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.relu(self.conv(x)))))

    forward.__name__ = name
    net(
        UPSAMPLING, shape=(3, 5, 6), up=lambda: nn.ConvTranspose2d(8, 8, *args, **options), is_fast=name == "transposed"
    )(forward)


_transposed("transposed", 2, 2)
_transposed("transposed_overlapping", 3, 2, 1)
_transposed("transposed_output_padding", 3, 2, 1, 1)
_transposed("transposed_four", 4, 2, 1, bias=False)
_transposed("transposed_stride_one", 3, 1, 1)
_transposed("transposed_grouped", 3, 2, 1, groups=4)
_transposed("transposed_dilated", 3, 2, 1, dilation=2)
_transposed("transposed_large_padding", 3, 1, 2)
_transposed("transposed_oblong", (2, 4), (2, 3), (0, 1), output_padding=(1, 0))


@net(UPSAMPLING, up=lambda: nn.ConvTranspose2d(8, 8, 4, 2, 1))
def transposed_with_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.up(self.relu(self.conv(x))))))


@net(UPSAMPLING, up=lambda: nn.ConvTranspose2d(8, 4, 2, 2), dec=lambda: nn.Conv2d(12, 8, 3, padding=1))
def unet(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.bn(self.conv(x)))
    b = self.relu(self.bn2(self.conv2(F.max_pool2d(a, 2))))
    return self.dec(torch.cat([a, self.up(b)], 1))


@net(UPSAMPLING, is_fast=True, grow=lambda: nn.Conv2d(8, 12, 3, padding=1), up=lambda: nn.PixelShuffle(2))
def super_resolution(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    y = y + 0.1 * self.conv2(y)
    return self.up(self.grow(y)) + F.interpolate(x, scale_factor=2)


@net(
    UPSAMPLING, up=lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), verdict=REFUSED, says="up"
)
def bilinear(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.up(self.relu(self.conv(x)))))


@net(UPSAMPLING, verdict=REFUSED, says="interpolate|bicubic")
def bicubic(self: Any, x: Tensor) -> Tensor:
    return self.head(F.interpolate(self.relu(self.conv(x)), scale_factor=2, mode="bicubic"))
