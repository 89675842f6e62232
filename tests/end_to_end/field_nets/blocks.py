"""Whole blocks as the well-known nets have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .registry import net, whole

KIND = "blocks"


class Bottleneck(nn.Module):
    """A residual bottleneck with one shared ReLU in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, 4, 1, bias=False)
        self.na = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.nb = nn.BatchNorm2d(4)
        self.c = nn.Conv2d(4, channels, 1, bias=False)
        self.nc = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        y = self.relu(self.na(self.a(x)))
        y = self.relu(self.nb(self.b(y)))
        y = self.nc(self.c(y))
        y += identity
        return self.relu(y)


@net(KIND, is_fast=True, block=lambda: Bottleneck(8), block2=lambda: Bottleneck(8))
def resnet(self: Any, x: Tensor) -> Tensor:
    return self.head(self.block2(self.block(self.relu(self.bn(self.conv(x))))))


@net(KIND, left=lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4))
def shufflenet(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    a, b = y.chunk(2, dim=1)
    y = torch.cat((a, F.relu(self.left(b))), dim=1)
    n, c, h, w = y.size()
    y = y.view(n, 2, c // 2, h, w)
    y = torch.transpose(y, 1, 2).contiguous().view(n, -1, h, w)
    return self.head(self.conv2(y))


@net(KIND, n=lambda: nn.BatchNorm2d(16), last=lambda: nn.Linear(16, 5))
def densenet(self: Any, x: Tensor) -> Tensor:
    y = self.conv(x)
    y = torch.cat([y, self.conv2(F.relu(self.bn(y), inplace=True))], 1)
    return self.last(F.adaptive_avg_pool2d(F.relu(self.n(y), inplace=True), (1, 1)).flatten(1))


@net(KIND, expand=lambda: nn.Conv2d(8, 16, 1), depth=lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16),
     project=lambda: nn.Conv2d(16, 8, 1), n=lambda: nn.BatchNorm2d(16))  # fmt: skip
def mobilenet(self: Any, x: Tensor) -> Tensor:
    y = F.relu6(self.bn(self.conv(x)))
    z = F.relu6(self.n(self.depth(F.relu6(self.expand(y)))))
    return self.head(y + self.bn2(self.project(z)))


@net(KIND, a=lambda: nn.Conv2d(3, 2, 1), b=lambda: nn.Conv2d(3, 2, 3, padding=1), c=lambda: nn.Conv2d(3, 4, 1))
def inception(self: Any, x: Tensor) -> Tensor:
    c = self.c(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
    return self.head(self.conv2(torch.cat([F.relu(self.a(x)), F.relu(self.b(x)), F.relu(c)], 1)))


@net(KIND, rep=lambda: nn.Conv2d(8, 8, 1), skip=lambda: nn.BatchNorm2d(8))
def repvgg(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    return self.head(F.relu(self.bn(self.conv2(y)) + self.bn2(self.rep(y)) + self.skip(y)))


@net(KIND, mid=lambda: nn.Conv2d(4, 4, 3, padding=1), join=lambda: nn.Conv2d(12, 8, 1))
def cross_stage_partial(self: Any, x: Tensor) -> Tensor:
    y = F.silu(self.bn(self.conv(x)))
    parts = list(y.split((4, 4), 1))
    parts.append(F.silu(self.mid(parts[-1])))
    return self.head(F.silu(self.join(torch.cat(parts, 1))))


@net(KIND, join=lambda: nn.Conv2d(32, 8, 1))
def spatial_pyramid(self: Any, x: Tensor) -> Tensor:
    y = F.leaky_relu(self.conv(x), 0.1)
    a = F.max_pool2d(y, 3, 1, 1)
    b = F.max_pool2d(a, 3, 1, 1)
    return self.head(self.join(torch.cat([y, a, b, F.max_pool2d(b, 3, 1, 1)], 1)))


@net(KIND, top=lambda: nn.Conv2d(8, 8, 1))
def feature_pyramid(self: Any, x: Tensor) -> Any:
    a = self.relu(self.conv(x))
    b = self.relu(self.down(a))
    top = self.top(b)
    up = F.interpolate(top, size=a.shape[-2:], mode="nearest")
    return self.head(self.conv2(a) + up) + self.fc(top.mean((2, 3)))


@net(KIND)
def concatenated_relu_net_of_residuals(self: Any, x: Tensor) -> Tensor:
    y = self.relu(self.conv(x))
    for layer in (self.conv2, self.conv3):
        y = y + 0.5 * F.relu(layer(y))
    return self.head(y)


class Fire(nn.Module):
    """SqueezeNet's block."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.one, self.three = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.squeeze(x))
        return torch.cat([self.act(self.one(x)), self.act(self.three(x))], 1)


@whole(KIND)
def squeezenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), Fire(), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(), nn.Dropout(0.0),
        nn.Conv2d(8, 5, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
    )  # fmt: skip


@whole(KIND)
def vgg_of_a_list() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 4), (4, 8)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 12), nn.ReLU(True), nn.Linear(12, 5))
