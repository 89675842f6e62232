"""LeNet-5 and its half, as data-free distillation compares them."""

from __future__ import annotations

from torch import Tensor, nn

from qkd.image_size import ImageSize, side_of_square

SIDE = 32  # LeNet-5 reads 32x32; smaller images are padded to it by the first convolution


class LeNet(nn.Module):
    """Three 5x5 convolutions with ReLU, max pooling after the first two, and two linear layers.

    Note: LeCun et al. use scaled tanh, trained sub-sampling and a sparse second layer; this is the form with ReLU, max
    pooling and full connections that the distillation literature calls LeNet-5.

    Args:
        widths: Channels of the convolutions, then units of the first linear layer.
        classes: Outputs.
        channels: Channels of the image.
        image_size: Side in pixels, even, at most 32.

    Raises:
        ValueError: If ``image_size`` is odd or above 32.

    References:
        LeCun, Bottou, Bengio, Haffner, `Gradient-Based Learning Applied to Document Recognition
        <http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf>`_, 1998, section II.B.
    """

    def __init__(
        self, widths: tuple[int, int, int, int], *, classes: int, channels: int, image_size: ImageSize
    ) -> None:
        super().__init__()
        side = side_of_square(image_size, "LeNet")
        if side > SIDE or side % 2:
            raise ValueError(f"LeNet takes images of an even side up to {SIDE}, got {image_size=}")
        self.conv1 = nn.Conv2d(channels, widths[0], 5, padding=(SIDE - side) // 2)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 5)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.conv3 = nn.Conv2d(widths[1], widths[2], 5)
        self.relu3 = nn.ReLU()
        self.flatten = nn.Flatten(1)
        self.fc1 = nn.Linear(widths[2], widths[3])
        self.relu4 = nn.ReLU()
        self.fc2 = nn.Linear(widths[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[batch, channels, height, width]`` to logits ``[batch, classes]``."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.flatten(self.relu3(self.conv3(x)))
        return self.fc2(self.relu4(self.fc1(x)))  # type: ignore[no-any-return]


def lenet5(*, classes: int, channels: int, image_size: ImageSize) -> LeNet:
    """Build LeNet-5: 6, 16, 120 channels, 84 units (61,706 parameters for 10 classes of gray images)."""
    return LeNet((6, 16, 120, 84), classes=classes, channels=channels, image_size=image_size)


def lenet5_half(*, classes: int, channels: int, image_size: ImageSize) -> LeNet:
    """Build its half: 3, 8, 60 channels, 42 units (15,738 parameters for 10 classes of gray images)."""
    return LeNet((3, 8, 60, 42), classes=classes, channels=channels, image_size=image_size)
