"""Float nets by name: the papers' own and torchvision's."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from qkd.nets.alexnet import AlexNetCifar
from qkd.nets.lenet import lenet5, lenet5_half
from qkd.nets.near import net_hint
from qkd.nets.resnet import cifar_resnet, resnet18_cifar
from qkd.nets.torchvision_nets import PREFIX, build_torchvision, torchvision_names
from qkd.nets.wide_resnet import WideResNet

Builder = Callable[[int, int, int], nn.Module]  # classes, channels, image_size

NETS: dict[str, Builder] = {
    "alexnet_cifar": lambda classes, channels, size: AlexNetCifar(classes=classes, channels=channels, image_size=size),
    "lenet5": lambda classes, channels, size: lenet5(classes=classes, channels=channels, image_size=size),
    "lenet5_half": lambda classes, channels, size: lenet5_half(classes=classes, channels=channels, image_size=size),
    "resnet18_cifar": lambda classes, channels, size: resnet18_cifar(classes=classes, channels=channels),
    "resnet20": lambda classes, channels, size: cifar_resnet(20, classes=classes, channels=channels),
    "resnet32": lambda classes, channels, size: cifar_resnet(32, classes=classes, channels=channels),
    "resnet56": lambda classes, channels, size: cifar_resnet(56, classes=classes, channels=channels),
    "resnet8": lambda classes, channels, size: cifar_resnet(8, classes=classes, channels=channels),
    "wrn_16_1": lambda classes, channels, size: WideResNet(16, 1, classes=classes, channels=channels),
    "wrn_16_2": lambda classes, channels, size: WideResNet(16, 2, classes=classes, channels=channels),
    "wrn_40_1": lambda classes, channels, size: WideResNet(40, 1, classes=classes, channels=channels),
    "wrn_40_2": lambda classes, channels, size: WideResNet(40, 2, classes=classes, channels=channels),
}


def net_names() -> list[str]:
    """Return every name that :func:`build_net` knows (imports torchvision).

    Returns:
        Ours in alphabetical order, then ``torchvision/...``.
    """
    return [*sorted(NETS), *torchvision_names()]


def build_net(name: str, *, classes: int, channels: int, image_size: int) -> nn.Module:
    """Build a float net with random weights (drawn from torch's global generator), in training mode.

    Args:
        name: A key of ``NETS``, or ``torchvision/<name>``.
        classes: Outputs, at least 2.
        channels: Channels of the image, positive.
        image_size: Side in pixels of the square images, positive.

    Returns:
        A net from ``[batch, channels, image_size, image_size]`` to logits ``[batch, classes]``. ``quantizers.prepare``
        takes all but torchvision's nets with layer norm or attention.

    Raises:
        ValueError: If the name is unknown (with the nearest one), a number is out of range, or the net cannot take
            images of this size or with these channels.

    Example:
        >>> import torch
        >>> net = build_net("resnet8", classes=10, channels=1, image_size=28)
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if classes < 2 or channels < 1 or image_size < 1:
        raise ValueError(
            f"a net needs at least 2 classes, 1 channel and 1 pixel, got {classes=}, {channels=}, {image_size=}"
        )
    if name in NETS:
        return NETS[name](classes, channels, image_size)
    if name.startswith(PREFIX) and name in torchvision_names():
        return build_torchvision(name, classes=classes, channels=channels, image_size=image_size)
    hint = net_hint(name, net_names())
    raise ValueError(f"unknown net {name!r}{'; ' if hint else ''}{hint}; `qkd ls nets` lists them")
