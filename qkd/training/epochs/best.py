"""The weights of the epoch with the best validation accuracy, for a training that keeps those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "best/"  # of tensor names in a checkpoint


class BestWeights:
    """Holds a copy of a model's best state so far; among equally good epochs, the last one's."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.accuracy = -1.0
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def offer(self, model: nn.Module, *, epoch: int, accuracy: float) -> None:
        """Keep a model's state if no earlier one was better.

        Args:
            model: The model with the scored weights.
            epoch: From 1.
            accuracy: Accuracy on the validation images, as a fraction.
        """
        if accuracy < self.accuracy:
            return
        self.epoch, self.accuracy = epoch, accuracy
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and values for a checkpoint."""
        return {PREFIX + name: tensor for name, tensor in self.tensors.items()}, {
            "epoch": self.epoch,
            "accuracy": self.accuracy,
        }

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state` returned."""
        self.epoch, self.accuracy = values["epoch"], values["accuracy"]
        own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
        self.tensors = {name: tensor.to(device) for name, tensor in own.items()}
