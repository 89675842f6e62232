"""Build a user's net for the given images, and check that it returns one logit per class."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkd.foreign.user_code import code_hash, file_of, imports_beside, load_place
from qkd.image_size import ImageSize, height_width, size_text
from qkd.nets.own.spelling import NetSpelling
from quantizers.modes import evaluating

FACTS = {  # what a net is built for -> the usual names of the builder's parameter
    "classes": ("classes", "num_classes", "n_classes"),
    "channels": ("channels", "in_channels", "in_chans", "num_channels"),
    "image_size": ("image_size", "img_size", "input_size"),
}
_checked: set[tuple[str, ...]] = set()  # nets that passed the check in this process


def build_own(net: NetSpelling, *, classes: int, channels: int, image_size: ImageSize) -> nn.Module:
    """Call a user's function or class, and check the result.

    It is called with its options. It also gets ``classes``, ``channels`` and ``image_size`` if its signature has them
    (under the usual names: ``num_classes``, ``in_channels``, ``img_size``, ...) and the options do not set them.

    Args:
        net: Which net.
        classes: Number of outputs.
        channels: Channels of the image.
        image_size: In pixels.

    Raises:
        ValueError: If it cannot be imported, its builder raises, or its net does not return ``[batch, classes]``.
    """
    try:
        builder: Callable[..., Any] = load_place(net.name)
    except Exception as error:  # the user's code can raise anything, which is then reported
        raise ValueError(f"net {net.title}: cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(builder):
        raise ValueError(
            f"net {net.title}: has type {type(builder).__name__}, but must be a function or class that builds a net"
        )
    if isinstance(builder, nn.Module):
        kind = type(builder).__name__
        raise ValueError(f"net {net.title}: is an instance of {kind}, a net that is already built; name the class "
                         f"{kind}, or a function that returns a new one")  # fmt: skip
    facts = {"classes": classes, "channels": channels, "image_size": image_size}
    given = {**_wanted(builder, facts, net.options), **net.options}
    try:
        with imports_beside(net.name):
            made = builder(**given)
    except Exception as error:
        words = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"net {net.title}: building it with ({words}) failed: {type(error).__name__}: {error}; "
                         "`net_options` are its keyword arguments") from error  # fmt: skip
    if not isinstance(made, nn.Module):
        raise ValueError(f"net {net.title}: returns {type(made).__name__}, not a torch.nn.Module")
    _check_logits(net, made.train(), classes, channels, image_size)
    return made


def _wanted(builder: Callable[..., Any], facts: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        names = inspect.signature(builder).parameters
    except (TypeError, ValueError):  # a builder in C, or one that hides its signature
        return {}
    found: dict[str, Any] = {}
    for fact, spellings in FACTS.items():
        if not any(name in options for name in spellings):
            found |= {name: facts[fact] for name in spellings if name in names}
    return found


def _check_logits(net: NetSpelling, made: nn.Module, classes: int, channels: int, image_size: ImageSize) -> None:
    """Run the net on two black images, once for each net and size."""
    file = file_of(net.name)
    key = (str(net), "" if file is None else code_hash(file), str(classes), str(channels), size_text(image_size))
    if key in _checked:
        return
    images = torch.zeros(2, channels, *height_width(image_size))
    what = f"{channels} x {size_text(image_size)} images"
    with torch.random.fork_rng(devices=[]), evaluating(made), torch.no_grad():
        try:
            logits = made(images)
        except Exception as error:
            raise ValueError(f"net {net.title}: cannot take {what}: {type(error).__name__}: {error}") from error
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, classes):
        if isinstance(logits, Tensor):
            found = f"{list(logits.shape)} for a batch of 2"
            advice = "give its builder a parameter `num_classes`, which is set automatically, or set `net_options`"
        else:
            found = f"a {type(logits).__name__}"
            advice = "return one tensor in eval(): a small module around the net can take the logits out"
        raise ValueError(f"net {net.title}: must return logits [batch, {classes}] for {what}, got {found}; {advice}")
    _checked.add(key)
