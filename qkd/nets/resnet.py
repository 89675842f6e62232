"""Residual nets for small images: ResNet-8/20/32/56 of He et al. and ResNet-18 with a 3x3 stem."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

CIFAR_WIDTHS = (16, 32, 64)
RESNET18_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, each ReLU a separate module so that its path names one tensor.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(in_channels, out_channels, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, height, width]`` to ``[batch, out_channels, height / stride, width / stride]``."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A 3x3 stem, stages ``layer1``, ``layer2``, ... of basic blocks, global mean, linear ``fc``.

    Note: He et al. take parameter-free shortcuts (option A: subsample, pad with zero channels) on CIFAR-10; we take
    1x1 convolutions with batch norm (option B), because a low-bit student needs shortcuts that are separate layers
    with their own scale, and role-kd's nets have them too. ResNet-20 has 1 % more parameters for it.

    Args:
        blocks: Blocks of each stage.
        widths: Channels of each stage; all but the first begin with stride 2.
        classes: Outputs.
        channels: Channels of the image.
        width: Factor on the channels of the stages, positive; the stem keeps those of the first stage, so that nets of
            several widths can share it.

    Raises:
        ValueError: If ``width`` is not positive and finite.

    References:
        He, Zhang, Ren, Sun, `Deep Residual Learning for Image Recognition <https://arxiv.org/abs/1512.03385>`_, 2016,
        section 4.2; initialization: He et al., `Delving Deep into Rectifiers <https://arxiv.org/abs/1502.01852>`_,
        2015.
    """

    def __init__(self, blocks: int, widths: Sequence[int], *, classes: int, channels: int, width: float = 1.0) -> None:
        super().__init__()
        if not (math.isfinite(width) and width > 0):
            raise ValueError(f"width must be a positive factor on the channels of the stages, got {width=}")
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        in_channels, stages = widths[0], []
        for number, full in enumerate(widths, start=1):
            stages.append(f"layer{number}")
            out_channels = max(1, round(full * width))
            self.add_module(stages[-1], _stage(in_channels, out_channels, blocks, stride=1 if number == 1 else 2))
            in_channels = out_channels
        self.stages = tuple(stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(in_channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, channels, height, width]`` to logits ``[batch, classes]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        return self.fc(self.flatten(self.pool(x)))  # type: ignore[no-any-return]


def cifar_resnet(depth: int, *, classes: int, channels: int, width: float = 1.0) -> ResNet:
    """Build the CIFAR net of ``depth`` = 6n + 2 layers: n blocks in each of 3 stages of 16, 32, 64 channels.

    Args:
        depth: In layers.
        classes: Outputs.
        channels: Channels of the image.
        width: Factor on the channels of the stages; the stem has 16.

    Raises:
        ValueError: If ``depth`` is not 8, 14, 20, ..., or ``width`` is not positive.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth of a CIFAR ResNet must be 6n + 2, got {depth=}")
    return ResNet((depth - 2) // 6, CIFAR_WIDTHS, classes=classes, channels=channels, width=width)


def resnet18_cifar(*, classes: int, channels: int, width: float = 1.0) -> ResNet:
    """Build ResNet-18 as used on CIFAR: a 3x3 stem with stride 1, no pooling after it, 4 stages of 2 blocks.

    Args:
        classes: Outputs.
        channels: Channels of the image.
        width: Factor on the channels of the stages; the stem has 64.

    Raises:
        ValueError: If ``width`` is not positive.
    """
    return ResNet(2, RESNET18_WIDTHS, classes=classes, channels=channels, width=width)


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    rest = [BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *rest)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))
