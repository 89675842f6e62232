"""Every torchvision classification net by name, with the requested number of classes and channels."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import nn

from qkd.image_size import ImageSize, height_width, side_of_square, size_text
from qkd.nets.near import PREFIX


def torchvision_names() -> list[str]:
    """Return the names of torchvision's classification nets, each with the prefix ``torchvision/``, sorted."""
    from torchvision import models

    return [PREFIX + name for name in sorted(models.list_models(module=models))]


def build_torchvision(name: str, *, classes: int, channels: int, image_size: ImageSize, **options: Any) -> nn.Module:
    """Build a torchvision net with random weights for these images.

    GoogLeNet and Inception come without their auxiliary heads (one output, as everywhere here). The first convolution
    is replaced where the images have other than 3 channels.

    Args:
        name: ``torchvision/<name>``.
        classes: Outputs.
        channels: Channels of the image.
        image_size: Side in pixels, or height and width. Transformers are built for it.
        **options: Keyword arguments of torchvision's builder.

    Raises:
        ValueError: If the net cannot take such images.
    """
    from torchvision import models

    bare = name.removeprefix(PREFIX)
    options = {**_options(bare, image_size), **options}
    try:
        net: nn.Module = models.get_model(bare, weights=None, num_classes=classes, **options)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} cannot be built for {size_text(image_size)} images: {error}") from error
    if channels != 3:
        _replace_first_conv(name, net, channels)
    _check_takes(name, net, channels, image_size)
    return net


def _options(name: str, image_size: ImageSize) -> dict[str, Any]:
    if name == "googlenet" or name == "inception_v3":
        # init_weights is spelled out because torchvision warns that its default will change.
        return {"aux_logits": False, "init_weights": True, "transform_input": False}
    if name.startswith("vit_"):
        return {"image_size": side_of_square(image_size, f"{PREFIX}{name}")}
    if name == "maxvit_t":
        return {"input_size": height_width(image_size)}
    return {}


def _replace_first_conv(name: str, net: nn.Module, channels: int) -> None:
    for path, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != 3 or module.groups != 1:
                break
            parent = net.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], _like(module, channels))
            return
    raise ValueError(f"{name} does not start with a convolution of 3 channels to adapt to {channels}; use color images")


def _like(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    names = [p for p in inspect.signature(nn.Conv2d).parameters if p in nn.Conv2d.__constants__ or p == "kernel_size"]
    options = {key: getattr(conv, key) for key in names if key not in ("in_channels", "out_channels")}
    return nn.Conv2d(channels, conv.out_channels, bias=conv.bias is not None, **options)


def _check_takes(name: str, net: nn.Module, channels: int, image_size: ImageSize) -> None:
    """Run the net on shapes alone (meta device): too small an image is found here, not in training."""
    shadow = copy.deepcopy(net).to("meta").eval()
    images = torch.empty((2, channels, *height_width(image_size)), device="meta")
    try:
        with torch.no_grad():
            shadow(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise ValueError(f"{name} cannot take {size_text(image_size)} images: {reason}") from error
