"""A frozen teacher that reports its activations for images: logits, last feature, statistics at its batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qkd.losses import batch_norm_loss
from qkd.terms.last_layer import LinearCalls, logits_layer


@dataclass(frozen=True)
class Seen:
    """A teacher's outputs for a batch.

    Args:
        logits: Shape ``[batch, classes]``, with their graph.
        feature: The input to the linear layer that gives the logits, shape ``[batch, ...]``; None if none does.
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
        self._linears = LinearCalls(net)

    def __call__(self, images: Tensor) -> Seen:
        """Return the teacher's outputs for normalized images, with their graph."""
        inputs: list[tuple[Tensor, _BatchNorm]] = []
        with self._hooked(inputs), self._linears.reading():
            logits: Tensor = self.net(images)
        found = self._linears.take(logits)
        means, variances = zip(*((norm.running_mean, norm.running_var) for _, norm in inputs), strict=True) if (
            inputs
        ) else ((), ())  # fmt: skip
        return Seen(logits, None if found is None else found[1], tuple(one for one, _ in inputs), means, variances)

    def last(self, image_shape: tuple[int, int, int]) -> nn.Linear:
        """Return the linear layer that gives the logits.

        Args:
            image_shape: Channels, height and width.

        Raises:
            ValueError: If none does.
        """
        found = last_layer_of(self.net, image_shape)
        if found is None:
            raise ValueError("the teacher's logits do not come from a linear layer, whose weights this method reads")
        return found

    @contextmanager
    def _hooked(self, inputs: list[tuple[Tensor, _BatchNorm]]) -> Iterator[None]:
        def at_norm(norm: nn.Module, arguments: tuple[Any, ...]) -> None:
            inputs.append((arguments[0], norm))  # type: ignore[arg-type]

        handles = [norm.register_forward_pre_hook(at_norm) for norm in self.norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def norms_of(net: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a net that keep running statistics."""
    return [one for one in net.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]


def last_layer_of(net: nn.Module, image_shape: tuple[int, int, int]) -> nn.Linear | None:
    """Return the linear layer that gives a net's logits, or None if none does: something follows it, say.

    Args:
        net: The net; it is run once.
        image_shape: Channels, height and width.
    """
    device = next((one.device for one in net.parameters()), torch.device("cpu"))
    found = logits_layer(net, torch.zeros(2, *image_shape, device=device))
    return None if found is None else cast(nn.Linear, net.get_submodule(found[0]))
