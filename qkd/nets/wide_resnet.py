"""Wide residual nets WRN-d-k: pre-activation blocks, k times the channels."""

from __future__ import annotations

from torch import Tensor, nn

BASE_WIDTHS = (16, 32, 64)


class PreActBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice, and a shortcut; a 1x1 convolution where the shape changes.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.changes_shape = stride != 1 or in_channels != out_channels
        if self.changes_shape:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_channels, height, width]`` to ``[batch, out_channels, height / stride, width / stride]``."""
        active = self.relu1(self.bn1(x))
        out = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        # Where the shape changes, the shortcut starts at the activated input; else it carries the input itself.
        return out + (self.shortcut(active) if self.changes_shape else x)  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    """A 3x3 stem, stages ``layer1`` to ``layer3``, batch norm and ReLU, global mean, linear ``fc``.

    Args:
        depth: 6n + 4, for n blocks per stage.
        widen: Factor k on 16, 32, 64 channels.
        classes: Outputs.
        channels: Channels of the image.

    Raises:
        ValueError: If ``depth`` is not 10, 16, 22, ... or ``widen`` is not positive.

    References:
        Zagoruyko, Komodakis, `Wide Residual Networks <https://arxiv.org/abs/1605.07146>`_, 2016, section 2, table 1.
    """

    def __init__(self, depth: int, widen: int, *, classes: int, channels: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widen < 1:
            raise ValueError(f"a WRN needs depth 6n + 4 and a positive widening, got {depth=}, {widen=}")
        blocks = (depth - 4) // 6
        widths = [BASE_WIDTHS[0], *(width * widen for width in BASE_WIDTHS)]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.layer1 = _stage(widths[0], widths[1], blocks, stride=1)
        self.layer2 = _stage(widths[1], widths[2], blocks, stride=2)
        self.layer3 = _stage(widths[2], widths[3], blocks, stride=2)
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten(1)
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, channels, height, width]`` to logits ``[batch, classes]``."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.flatten(self.pool(self.relu(self.bn(x)))))  # type: ignore[no-any-return]


def _stage(in_channels: int, out_channels: int, blocks: int, *, stride: int) -> nn.Sequential:
    rest = [PreActBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(PreActBlock(in_channels, out_channels, stride), *rest)
