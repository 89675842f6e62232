"""Torchvision's trained weights: downloaded once into PyTorch's cache, and checked against the hash in their name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from qkd.files import sha256_of
from qkd.nets.near import PREFIX
from qkd.nets.own.spelling import parse_net
from qkd.nets.weights import WeightsError

IMAGENET = "imagenet"  # in a config, in place of a file
_HASH = re.compile(r"-([0-9a-f]{8,})\.pth$")
_OWN_SCALE = ("googlenet", "inception_v3")  # ported: they expect -1..1, and torchvision rescales inside the net


@dataclass(frozen=True)
class Preprocessing:
    """How images are preprocessed for trained weights.

    Args:
        mean: Per channel (red, green, blue), fraction 0..1.
        std: Likewise.
        image_size: Side in pixels of the net's input.
        resize_size: Length in pixels of the shorter side before the center crop.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize_size: int
    interpolation: str


STANDARD = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 256, "bilinear")


def preprocessing_of(net: str) -> Preprocessing:
    """Return the preprocessing that a torchvision net's ImageNet weights expect; the usual values for other nets.

    Args:
        net: As a config spells it.

    Raises:
        WeightsError: If torchvision has no weights for this net.
    """
    bare = parse_net(net).name
    if not bare.startswith(PREFIX):
        return STANDARD
    preset = _weights_of(bare).transforms()
    is_own_scale = bare.removeprefix(PREFIX) in _OWN_SCALE
    half = (0.5, 0.5, 0.5)
    return Preprocessing(
        half if is_own_scale else tuple(preset.mean),
        half if is_own_scale else tuple(preset.std),
        int(preset.crop_size[0]),
        int(preset.resize_size[0]),
        str(preset.interpolation.value),
    )


def weights_file(weights: Path, net: str) -> Path:
    """Return the file that a config's ``weights`` refer to: the path itself, or the file behind ``imagenet``.

    Args:
        weights: A path, or ``imagenet``.
        net: The net that the weights are for, as a config spells it.

    Raises:
        WeightsError: If the net is not one of torchvision's, or the file cannot be downloaded.
    """
    return weights if str(weights) != IMAGENET else imagenet_file(net)


def imagenet_file(net: str) -> Path:
    """Return torchvision's ImageNet weights for a net, downloaded if they are not in the cache yet.

    The cache is PyTorch's: ``$TORCH_HOME/hub/checkpoints``, by default ``~/.cache/torch/hub/checkpoints``.

    Raises:
        WeightsError: If the net is not one of torchvision's, there is no network, or the file does not match its name.
    """
    import torch

    bare = parse_net(net).name
    if not bare.startswith(PREFIX):
        raise WeightsError(
            f"weights: imagenet: torchvision only has weights for its own nets, but the net is {net!r}; use "
            f"net: torchvision/..., or name a weights file"
        )
    url = str(_weights_of(bare).url)
    name = Path(urlparse(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.is_file():
        _fetch(url, path)
    _require_hash(path)
    return path


def _weights_of(name: str) -> Any:
    from torchvision import models

    found = models.get_model_weights(name.removeprefix(PREFIX))
    return found.DEFAULT


def _fetch(url: str, path: Path) -> None:
    import torch

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=_prefix(path.name), progress=False)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise WeightsError(
            f"weights: imagenet: cannot download {url} ({' '.join(str(error).split())}); without a network connection, "
            f"put that file into {path.parent}, or name a weights file"
        ) from error


def _require_hash(path: Path) -> None:
    prefix = _prefix(path.name)
    if prefix is not None and not sha256_of(path).startswith(prefix):
        raise WeightsError(f"{path}: damaged: its SHA-256 does not start with {prefix}; delete it to download it again")


def _prefix(name: str) -> str | None:
    match = _HASH.search(name)
    return None if match is None else match[1]
