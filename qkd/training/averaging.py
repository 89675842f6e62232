"""The exponential moving average of a model's weights: smoother than the last step's, and what is kept at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WARMUP_OFFSET = 10  # decay (1 + t) / (10 + t) until it reaches the configured one; otherwise the first weights linger
BATCH_NORM_STATISTICS = ("running_mean", "running_var")


class WeightAverage:
    """Averages of a model's parameters and of its batch-norm statistics.

    Statistics are averaged with the weights they belong to. All other buffers (counters, zero points, flags) cannot be
    averaged; the model's current ones are used.

    Args:
        model: Its weights are the first average.
        decay: Share of the old average kept by a step, in ``(0, 1)``.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in averaged_tensors(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the averages toward the model's weights.

        Args:
            model: The model that is averaged from the start.
            step: Optimizer steps done before this one, from 0.
        """
        decay = min(self.decay, (1 + step) / (WARMUP_OFFSET + step))
        live = averaged_tensors(model)
        # lerp leaves equal values exactly equal; decay * a + (1 - decay) * a would not
        torch._foreach_lerp_(list(self.tensors.values()), [live[name] for name in self.tensors], 1 - decay)

    @torch.no_grad()
    def renew_statistics(self, model: nn.Module) -> None:
        """Use a model's batch-norm statistics, which were just set again, in place of the averages of earlier ones."""
        for name, statistic in _statistics(model).items():
            self.tensors[name].copy_(statistic)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the averages (same names and shapes)."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the model the averaged weights."""
        for name, tensor in averaged_tensors(model).items():
            tensor.copy_(self.tensors[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights within a block, and restore its own afterward."""
        own = {name: tensor.detach().clone() for name, tensor in averaged_tensors(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in averaged_tensors(model).items():
                    tensor.copy_(own[name])


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the live tensors that are averaged, by name: parameters and batch-norm statistics."""
    return {**dict(model.named_parameters()), **_statistics(model)}


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name.rsplit(".", 1)[-1] in BATCH_NORM_STATISTICS and buffer.is_floating_point()
    }
