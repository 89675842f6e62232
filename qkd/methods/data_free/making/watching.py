"""A frozen teacher that reports its activations for images: logits, last feature, statistics at its batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkd.losses import batch_norm_loss


@dataclass(frozen=True)
class Seen:
    """A teacher's outputs for a batch.

    Args:
        logits: Shape ``[batch, classes]``, with their graph.
        feature: The input to its last linear layer, shape ``[batch, ...]``; None if it has none.
        inputs: The input to each batch norm.
        means: Their running means.
        variances: Their running variances.
    """

    logits: Tensor
    feature: Tensor | None
    inputs: tuple[Tensor, ...]
    means: tuple[Tensor, ...]
    variances: tuple[Tensor, ...]

    def statistics(self, form: str = "norms") -> Tensor:
        """Return :func:`qkd.losses.batch_norm_loss` of the batch; 0 for a teacher without batch norm."""
        if not self.inputs:
            return torch.zeros_like(self.logits.sum())
        return batch_norm_loss(self.inputs, self.means, self.variances, form=form)


class Watched:
    """A teacher in eval mode. Its weights and buffers do not change; gradients pass to the images.

    Args:
        net: Logits ``[batch, classes]`` of images. Its parameters no longer require a gradient.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)
        self.norms = norms_of(net)
        self.last = last_layer_of(net)

    def __call__(self, images: Tensor) -> Seen:
        """Return the teacher's outputs for normalized images, with their graph."""
        inputs: list[tuple[Tensor, _BatchNorm]] = []
        features: list[Tensor] = []
        with self._hooked(inputs, features):
            logits: Tensor = self.net(images)
        means, variances = zip(*((norm.running_mean, norm.running_var) for _, norm in inputs), strict=True) if (
            inputs
        ) else ((), ())  # fmt: skip
        return Seen(logits, features[-1] if features else None, tuple(one for one, _ in inputs), means, variances)

    @contextmanager
    def _hooked(self, inputs: list[tuple[Tensor, _BatchNorm]], features: list[Tensor]) -> Iterator[None]:
        def at_norm(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs.append((arguments[0], norm))  # type: ignore[arg-type]

        def at_last(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            features.append(arguments[0])

        handles = [norm.register_forward_pre_hook(at_norm) for norm in self.norms]
        handles += [] if self.last is None else [self.last.register_forward_pre_hook(at_last)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def norms_of(net: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a net that keep running statistics."""
    return [one for one in net.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]


def last_layer_of(net: nn.Module) -> nn.Linear | None:
    """Return a net's last linear layer, or None if it has none."""
    layers = [one for one in net.modules() if isinstance(one, nn.Linear)]
    return layers[-1] if layers else None
