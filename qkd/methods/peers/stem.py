"""A stem that all nets of a student ensemble share: the student's first convolution with its batch norm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantizers import Student, quant_layers
from quantizers.modes import evaluating


class SharedStem:
    """The student's stem; within a step the peers read its output for the batch, so that it runs once.

    Its gradient is the sum over all nets, and batch norm sees a batch once, as if all nets were one net with several
    heads. Outside a step (calibration and scores of peers) it is computed for them, in eval mode.

    Args:
        student: Low-bit or float.
        paths: The convolution of the float net, and its batch norm if it has one.

    Raises:
        ValueError: If the student has no such modules, or they have another type.
    """

    def __init__(self, student: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self.modules = _stem_modules(student, self.paths)
        self._value: Tensor | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the output of the student's forward pass for the peers' within a block."""

        def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            self._value = output

        handle = self.modules[-1].register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._value = None

    def __call__(self, images: Tensor) -> Tensor:
        """Return the stem's output for normalized images, ``[batch, channels, height, width]``."""
        if self._value is not None:
            return self._value
        with ExitStack() as stack, torch.no_grad():
            for module in self.modules:
                stack.enter_context(evaluating(module))
            for module in self.modules:
                images = module(images)
        return images


class Borrowed(nn.Module):
    """The replacement of a peer's own stem; it has no parameters.

    Args:
        stem: The student's.
    """

    def __init__(self, stem: SharedStem) -> None:
        super().__init__()
        self._stem = (stem,)  # a tuple hides it from Module: it is not part of the peer

    def forward(self, images: Tensor) -> Tensor:
        """Return the stem's output."""
        return self._stem[0](images)


def lend(stem: SharedStem, peer: nn.Module, name: str) -> None:
    """Put the student's stem in place of a peer's own.

    Args:
        stem: The student's.
        peer: Float or low-bit; changed in place.
        name: Name of the peer, for errors.

    Raises:
        ValueError: If it has no such modules, or its stem has another number of channels.
    """
    modules = _stem_modules(peer, stem.paths, name)
    own, theirs = (_convolution(one).out_channels for one in (modules, stem.modules))
    if own != theirs:
        raise ValueError(
            f"student.peers.stem: the stem of {name} has {own} channels, the student's {theirs}; give the nets stems "
            f"of the same size (option `width` of our ResNets leaves it unchanged), or leave `stem` out"
        )
    for module in modules:
        _put(peer, module, nn.Identity() if module is not modules[-1] else Borrowed(stem))


def _stem_modules(net: nn.Module, paths: Sequence[str], name: str = "the student") -> tuple[nn.Module, ...]:
    """Return the modules of a stem, in order; for a low-bit net, also the quantizer of the images."""
    known = dict(net.named_modules())
    found = [known.get(path) for path in paths]
    if isinstance(net, Student):
        layer = quant_layers(net).get(paths[0])
        has_norm = layer is not None and layer.bn is not None
        if layer is None or not hasattr(layer, "out_channels") or has_norm != (len(paths) == 2):
            raise ValueError(_no_stem(paths, name))
        return layer.source, layer
    kinds = (nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    if not all(isinstance(module, kind) for module, kind in zip(found, kinds, strict=False)):
        raise ValueError(_no_stem(paths, name))
    return tuple(module for module in found if module is not None)


def _no_stem(paths: Sequence[str], name: str) -> str:
    return (
        f"student.peers.stem: {name} has no convolution `{paths[0]}`{' with batch norm' if len(paths) == 2 else ''}"
        f"{f' `{paths[1]}`' if len(paths) == 2 else ' without batch norm'} at these paths of its float net; name its "
        f"first convolution and the batch norm after it, if there is one"
    )


def _convolution(modules: Sequence[nn.Module]) -> Any:
    return next(module for module in modules if hasattr(module, "out_channels"))


def _put(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    path = next(path for path, module in net.named_modules() if module is old)
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, new)
