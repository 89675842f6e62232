"""Float nets by name: those of the papers and torchvision's."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkd.image_size import ImageSize, height_width
from qkd.nets.near import PREFIX, net_hint
from qkd.nets.own.spelling import NetSpelling, parse_net

if TYPE_CHECKING:
    from torch import nn

_REGISTERED = re.compile(  # the decorator, perhaps with a name; other decorators; the function
    r"^@register_model\((?:name=)?(?:[\"'](?P<given>\w+)[\"'])?\)\n(?:[^d\n].*\n)*def (?P<own>\w+)", re.MULTILINE
)


@dataclass(frozen=True)
class NetRow:
    """A built-in net and where its builder is. Configs need only its name; PyTorch is imported when it is built.

    Args:
        home: Module of ``qkd.nets``.
        builder: Class or function in that module.
        sizes: Its positional arguments, such as the depth.
        is_sized: Whether it is built for a certain image size.
    """

    home: str
    builder: str
    sizes: tuple[int, ...] = ()
    is_sized: bool = False

    def build(self, classes: int, channels: int, image_size: ImageSize, **options: Any) -> nn.Module:
        """Return the net with random weights; arguments as of :func:`build_net`."""
        builder = getattr(importlib.import_module(f"qkd.nets.{self.home}"), self.builder)
        own = {"image_size": image_size} if self.is_sized else {}
        net: nn.Module = builder(*self.sizes, classes=classes, channels=channels, **own, **options)
        return net


NETS: dict[str, NetRow] = {
    "alexnet_cifar": NetRow("alexnet", "AlexNetCifar", is_sized=True),
    "lenet5": NetRow("lenet", "lenet5", is_sized=True),
    "lenet5_half": NetRow("lenet", "lenet5_half", is_sized=True),
    "resnet18_cifar": NetRow("resnet", "resnet18_cifar"),
    "resnet20": NetRow("resnet", "cifar_resnet", (20,)),
    "resnet32": NetRow("resnet", "cifar_resnet", (32,)),
    "resnet56": NetRow("resnet", "cifar_resnet", (56,)),
    "resnet8": NetRow("resnet", "cifar_resnet", (8,)),
    "wrn_16_1": NetRow("wide_resnet", "WideResNet", (16, 1)),
    "wrn_16_2": NetRow("wide_resnet", "WideResNet", (16, 2)),
    "wrn_40_1": NetRow("wide_resnet", "WideResNet", (40, 1)),
    "wrn_40_2": NetRow("wide_resnet", "WideResNet", (40, 2)),
}


def net_names() -> list[str]:
    """Return every name that :func:`build_net` accepts: ours, then ``torchvision/...``, without importing torchvision.

    Returns:
        Ours in alphabetical order, then ``torchvision/...``.

    Raises:
        OSError: If torchvision's own files cannot be read.
    """
    return [*sorted(NETS), *registered_names()]


@cache
def registered_names() -> list[str]:
    """Return the ``torchvision_nets.torchvision_names`` from torchvision's source, since importing it takes seconds.

    If the source cannot be parsed as expected, torchvision is imported after all.
    """
    spec = find_spec("torchvision")
    folder = Path(spec.origin).parent / "models" if spec is not None and spec.origin else Path()
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
    found = {match["given"] or match["own"] for text in texts for match in _REGISTERED.finditer(text)}
    if len(found) < sum(text.count("\n@register_model(") for text in texts) or not found:
        from qkd.nets.torchvision_nets import torchvision_names

        return torchvision_names()
    return [PREFIX + name for name in sorted(found)]


def build_net(name: str, *, classes: int, channels: int, image_size: ImageSize) -> nn.Module:
    """Build a float net with random weights (drawn from torch's global generator), in training mode.

    Args:
        name: A key of ``NETS``, ``torchvision/<name>``, or user code (``path/to/file.py:function``,
            ``package.module:name``), optionally followed by options of its builder as JSON.
        classes: Outputs, at least 2.
        channels: Channels of the image, positive.
        image_size: Side in pixels of square images, or ``(height, width)``; positive.

    Returns:
        A net from ``[batch, channels, height, width]`` to logits ``[batch, classes]``. ``quantizers.prepare``
        takes all but torchvision's nets with layer norm or attention.

    Raises:
        ValueError: If the name is unknown (the message suggests similar ones), a number is out of range, or the net
            cannot take images of this size or with these channels.
        OSError: If torchvision's own files cannot be read.

    Example:
        >>> import torch
        >>> net = build_net("resnet8", classes=10, channels=1, image_size=28)
        >>> net(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if classes < 2 or channels < 1 or min(height_width(image_size)) < 1:
        raise ValueError(
            f"a net needs at least 2 classes, 1 channel and 1 pixel, got {classes=}, {channels=}, {image_size=}"
        )
    net = parse_net(name)
    sizes: dict[str, Any] = {"classes": classes, "channels": channels, "image_size": image_size}
    if net.is_own:
        from qkd.nets.own.building import build_own

        return build_own(net, **sizes)
    if net.name in NETS:
        return _with_options(net, lambda: NETS[net.name].build(**sizes, **net.options))
    if net.name.startswith(PREFIX) and net.name in registered_names():
        from qkd.nets.torchvision_nets import build_torchvision

        return _with_options(net, lambda: build_torchvision(net.name, **sizes, **net.options))
    raise ValueError(unknown_net(net.name))


def unknown_net(name: str) -> str:
    """Return the message for an unknown net name."""
    hint = net_hint(name, net_names())
    return (
        f"unknown net {name!r}{'; ' if hint else ''}{hint}; `qkd ls nets` lists them; a net of your own is "
        "path/to/file.py:function or package.module:name"
    )


def _with_options(net: NetSpelling, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except TypeError as error:
        if not net.options:
            raise
        raise ValueError(f"net {net}: invalid options: {error}") from error
