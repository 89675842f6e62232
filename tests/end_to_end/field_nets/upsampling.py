"""Segmentation and super-resolution: nearest interpolation and transposed convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import REFUSED, net

KIND = "upsampling"


@net(KIND, is_fast=True, up=lambda: nn.Upsample(scale_factor=2))
def nearest_module(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.up(self.relu(self.conv(x)))))


@net(KIND, up=lambda: nn.UpsamplingNearest2d(scale_factor=2))
def nearest_old_module(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.up(self.conv(x))))


@net(KIND)
def nearest_by_scale(self: Any, x: Tensor) -> Tensor:
    y = F.interpolate(self.relu(self.conv(x)), scale_factor=2, mode="nearest")
    return self.head(self.conv2(y))


@net(KIND)
def nearest_by_uneven_scale(self: Any, x: Tensor) -> Tensor:
    y = F.interpolate(self.relu(self.conv(x)), scale_factor=(1.5, 0.7))
    return self.head(self.conv2(y))


@net(KIND)
def nearest_by_size_of_another(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.conv(x))
    b = self.relu(self.down(a))
    return self.head(a + F.interpolate(b, size=a.shape[2:], mode="nearest"))


@net(KIND)
def nearest_exact(self: Any, x: Tensor) -> Tensor:
    y = F.interpolate(self.relu(self.conv(x)), size=(11, 5), mode="nearest-exact")
    return self.head(self.conv2(y))


@net(KIND)
def nearest_odd_size(self: Any, x: Tensor) -> Tensor:
    return self.head(F.interpolate(self.conv(x), (13, 6)))


def _transposed(name: str, *args: Any, **options: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.head(F.relu(self.up(self.relu(self.conv(x)))))

    forward.__name__ = name
    net(KIND, shape=(3, 5, 6), up=lambda: nn.ConvTranspose2d(8, 8, *args, **options), is_fast=name == "transposed")(
        forward
    )


_transposed("transposed", 2, 2)
_transposed("transposed_overlapping", 3, 2, 1)
_transposed("transposed_output_padding", 3, 2, 1, 1)
_transposed("transposed_four", 4, 2, 1, bias=False)
_transposed("transposed_stride_one", 3, 1, 1)
_transposed("transposed_grouped", 3, 2, 1, groups=4)
_transposed("transposed_dilated", 3, 2, 1, dilation=2)
_transposed("transposed_large_padding", 3, 1, 2)
_transposed("transposed_oblong", (2, 4), (2, 3), (0, 1), output_padding=(1, 0))


@net(KIND, up=lambda: nn.ConvTranspose2d(8, 8, 4, 2, 1))
def transposed_with_norm(self: Any, x: Tensor) -> Tensor:
    return self.head(self.relu(self.bn(self.up(self.relu(self.conv(x))))))


@net(KIND, up=lambda: nn.ConvTranspose2d(8, 4, 2, 2), dec=lambda: nn.Conv2d(12, 8, 3, padding=1))
def unet(self: Any, x: Tensor) -> Tensor:
    a = self.relu(self.bn(self.conv(x)))
    b = self.relu(self.bn2(self.conv2(F.max_pool2d(a, 2))))
    return self.dec(torch.cat([a, self.up(b)], 1))


@net(KIND, is_fast=True, grow=lambda: nn.Conv2d(8, 12, 3, padding=1), up=lambda: nn.PixelShuffle(2))
def super_resolution(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    y = y + 0.1 * self.conv2(y)
    return self.up(self.grow(y)) + F.interpolate(x, scale_factor=2)


@net(KIND, up=lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), verdict=REFUSED, says="up")
def bilinear(self: Any, x: Tensor) -> Tensor:
    return self.head(self.conv2(self.up(self.relu(self.conv(x)))))


@net(KIND, verdict=REFUSED, says="interpolate|bicubic")
def bicubic(self: Any, x: Tensor) -> Tensor:
    return self.head(F.interpolate(self.relu(self.conv(x)), scale_factor=2, mode="bicubic"))
