"""The linear layer that gives a net's logits, found by running the net: the order of its modules does not tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkd.terms.taps import dequantized
from quantizers.modes import evaluating


class LinearCalls:
    """What a net's linear layers read and return; a context manager, with no hook outside the block.

    Args:
        net: Float or low-bit.
    """

    def __init__(self, net: nn.Module) -> None:
        self._layers = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)]
        self._calls: list[tuple[str, Tensor, object]] = []

    @contextmanager
    def reading(self) -> Iterator[LinearCalls]:
        """Hold the hooks within a block.

        Yields:
            The object itself.
        """
        handles = [
            layer.register_forward_hook(lambda _, given, made, path=path: self._keep(path, given[0], made))
            for path, layer in self._layers
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def take(self, logits: object, *, or_last: bool = False) -> tuple[str, Tensor] | None:
        """Return path and input of the layer whose output a net returned, and forget the calls.

        Args:
            logits: What the latest forward pass returned, itself.
            or_last: Whether the last layer to run serves if the logits are not a linear layer's own output.

        Returns:
            None if there is no such layer: something follows it, say, or none ran.
        """
        calls, self._calls = self._calls, []
        found = [call for call in calls if call[2] is logits] or (calls if or_last else [])
        return found[-1][:2] if found else None

    def _keep(self, path: str, read: object, made: object) -> None:
        self._calls.append((path, dequantized(read, path), made))


def logits_layer(net: nn.Module, images: Tensor) -> tuple[str, Tensor] | None:
    """Return path and input of the linear layer that gives a net's logits; None if there is none.

    Args:
        net: The net; it is run once, in eval mode, and stays unchanged.
        images: Normalized, shape ``[batch, channels, height, width]``.
    """
    with evaluating(net), torch.no_grad(), LinearCalls(net).reading() as calls:
        return calls.take(net(images))


class LogitsWeights:
    """The weights of the layer that gives a net's logits, which is looked for at the first batch.

    Args:
        net: The net.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._path: str | None = None

    def name(self, images: Tensor) -> str:
        """Return the name of the parameter.

        Args:
            images: Normalized, shape ``[batch, channels, height, width]``.

        Raises:
            ValueError: If the net's logits do not come from a linear layer, or its weights are computed from others.
        """
        name = f"{self._layer_path(images)}.weight".lstrip(".")
        if name not in dict(self._net.named_parameters()):
            raise ValueError(
                f"a loss term moves the weights of the linear layer that gives the teacher's logits (class_weights), "
                f"but `{name}` is computed from other parameters (weight norm, say); fold them into it "
                f"(torch.nn.utils.parametrize.remove_parametrizations), or use another term"
            )
        return name

    def __call__(self, images: Tensor) -> Tensor:
        """Return the weights, ``[classes, features]``, without a gradient: those that a low-bit layer computes with.

        Args:
            images: As for :meth:`name`.

        Raises:
            ValueError: If the net's logits do not come from a linear layer.
        """
        layer: Any = self._net.get_submodule(self._layer_path(images))
        weight: Tensor = layer.low_bit_weight() if hasattr(layer, "low_bit_weight") else layer.weight
        return weight.detach()

    def _layer_path(self, images: Tensor) -> str:
        if self._path is None:
            found = logits_layer(self._net, images[:2])
            if found is None:
                raise ValueError(
                    "a loss term reads the weights of the linear layer that gives the teacher's logits "
                    "(class_weights), but they come from none; end the net with one, or use another term"
                )
            self._path = found[0]
        return self._path
