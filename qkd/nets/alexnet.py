"""AlexNet for small images, the plain (not residual) net of the role-kd experiments."""

from __future__ import annotations

from torch import Tensor, nn

from qkd.image_size import ImageSize, height_width

SMALLEST_SIDE = 8  # three halvings


class AlexNetCifar(nn.Module):
    """Five convolutions (11x11, 5x5, 3x3 three times) with batch norm and ReLU, three poolings, three linear layers.

    Args:
        classes: Outputs.
        channels: Channels of the image.
        image_size: In pixels, each side at least 8; it sets the width of the first linear layer.

    Raises:
        ValueError: If ``image_size`` is below 8.

    References:
        The layout of the nets released with role-wise data augmentation (arXiv 2004.08861); Krizhevsky, Sutskever,
        Hinton, `ImageNet Classification with Deep Convolutional Neural Networks
        <https://papers.nips.cc/paper/4824>`_, 2012.
    """

    def __init__(self, *, classes: int, channels: int, image_size: ImageSize) -> None:
        super().__init__()
        height, width = height_width(image_size)
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(f"AlexNetCifar takes images of at least {SMALLEST_SIDE} pixels a side, got {image_size=}")
        self.conv1 = _conv(channels, 64, 11)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = _conv(64, 192, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = _conv(192, 384, 3)
        self.conv4 = _conv(384, 256, 3)
        self.conv5 = _conv(256, 256, 3)
        self.pool5 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten(1)
        self.fc1 = _linear(256 * (height // 8) * (width // 8), 4096)
        self.fc2 = _linear(4096, 4096)
        self.fc = nn.Linear(4096, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, channels, height, width]`` to logits ``[batch, classes]``."""
        x = self.pool2(self.conv2(self.pool1(self.conv1(x))))
        x = self.pool5(self.conv5(self.conv4(self.conv3(x))))
        return self.fc(self.fc2(self.fc1(self.flatten(x))))  # type: ignore[no-any-return]


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _linear(in_features: int, out_features: int) -> nn.Sequential:
    linear = nn.Linear(in_features, out_features, bias=False)
    return nn.Sequential(linear, nn.BatchNorm1d(out_features), nn.ReLU())
