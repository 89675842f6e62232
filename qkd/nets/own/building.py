"""Build a user's net for the given images, and check that it returns one logit per class."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qkd.foreign.user_code import code_hash, file_of, imports_beside, load_place
from qkd.image_size import ImageSize, height_width, size_text
from qkd.nets.own.spelling import NetSpelling
from qkd.units import counted
from quantizers.modes import evaluating

FACTS = {  # what a net is built for -> the usual names of the builder's parameter
    "classes": ("classes", "num_classes", "n_classes"),
    "channels": ("channels", "in_channels", "in_chans", "num_channels"),
    "image_size": ("image_size", "img_size", "input_size"),
}
_OTHER_SEED = 20_261_129
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

    def build() -> nn.Module:
        try:
            with imports_beside(net.name):
                made = builder(**given)
        except Exception as error:
            words = ", ".join(f"{key}={value!r}" for key, value in given.items())
            raise ValueError(f"net {net.title}: building it with ({words}) failed: {type(error).__name__}: {error}; "
                             "`net_options` are its keyword arguments") from error  # fmt: skip
        if not isinstance(made, nn.Module):
            raise ValueError(f"net {net.title}: returns {type(made).__name__}, not a torch.nn.Module")
        return made.train()

    made = build()
    file = file_of(net.name)
    key = (str(net), "" if file is None else code_hash(file), str(classes), str(channels), size_text(image_size))
    if key not in _checked:
        _check_logits(net, made, classes, channels, image_size)
        _check_rebuilt(net, made, build, torch.Size((2, channels, *height_width(image_size))))
        _checked.add(key)
    elif any(map(is_lazy, (*made.parameters(), *made.buffers()))):  # it is shaped by its first images
        _check_logits(net, made, classes, channels, image_size)
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
    """Run the net on two black images."""
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


def _check_rebuilt(net: NetSpelling, made: nn.Module, build: Callable[[], nn.Module], shape: torch.Size) -> None:
    """Build the net twice more, and compare nets of the same state: before, and after steps in train mode.

    Trained weights are stored, and loaded into a net that is built again: what the builder draws at random, and what
    `forward` changes in training, must be in the net's state.
    """
    _check_state(net, made)
    with _own_randomness(), evaluating(made), torch.no_grad():
        torch.manual_seed(_OTHER_SEED)
        other, third = (build().eval() for _ in range(2))
        tensors = [{id(one) for one in (*each.parameters(), *each.buffers())} for each in (made, other, third)]
        if shared := tensors[0] & tensors[1] or tensors[1] & tensors[2]:
            raise ValueError(
                f"net {net.title}: its builder returns {counted(len(shared), 'tensor')} of the net that it returned "
                f"before, so that teacher and student would share them; build new modules in every call"
            )
        images = torch.rand(shape)
        for each in (other, third):
            each(images)  # modules that are shaped by their first images
        _load(net, other, made)
        if not _is_same(made, other, images):
            raise ValueError(
                f"net {net.title}: built twice and given the same state, it computes different logits, so trained "
                f"weights could not be loaded: something that it draws when it is built is not in its state_dict; "
                f"make it a buffer: `self.register_buffer(NAME, tensor)`, persistent"
            )
        try:
            for _ in range(2):
                other.train()(images)
        except Exception:  # a training says what is wrong; a teacher that is not trained never gets there
            return
        _load(net, third, other)
        if not (_is_same(other.eval(), third.eval(), images) and _is_same(other.train(), third.train(), images)):
            raise ValueError(
                f"net {net.title}: its forward in train() changes something that is not in its state_dict (a counter, "
                f"a plain tensor), and its outputs depend on it, so trained weights could not be loaded, nor an "
                f"interrupted training resumed; make it a buffer: `self.register_buffer(NAME, tensor)`, persistent"
            )


def _check_state(net: NetSpelling, made: nn.Module) -> None:
    """Raise if a net's state cannot be stored as tensors, or not be restored in place."""
    state, again = made.state_dict(), made.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"net {net.title}: its state {name!r} has type {type(value).__name__}, but only tensors are stored; "
                f"make it a buffer: `self.register_buffer(NAME, tensor)`"
            )
        if value.numel() and value.data_ptr() != again[name].data_ptr():
            raise ValueError(
                f"net {net.title}: its state_dict returns copies ({name!r}: get_extra_state, or a hook), so a state "
                f"could not be restored; make it a buffer: `self.register_buffer(NAME, tensor)`"
            )


def _load(net: NetSpelling, model: nn.Module, source: nn.Module) -> None:
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        what = " ".join(str(error).split())[:300]
        raise ValueError(f"net {net.title}: its state fits no other net that its builder returns: {what}") from error


def _is_same(one: nn.Module, other: nn.Module, images: Tensor) -> bool:
    """Return whether two nets give the same for the same random draws; True if one of them differs from itself."""

    def outputs(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(_OTHER_SEED)
        random.seed(_OTHER_SEED)
        np.random.seed(_OTHER_SEED)
        found = model(images)
        values = found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else [found]
        return [value for value in values if isinstance(value, Tensor)]

    if not one.training and not all(map(torch.equal, outputs(one), outputs(one))):
        return True  # it draws at random in eval(), which others report
    pairs = zip(outputs(one), outputs(other), strict=True)
    return all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True) for ours, theirs in pairs)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep what is drawn within a block from changing what is drawn after it."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
