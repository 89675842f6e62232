"""The training step of a single net: cross-entropy with the labels."""

from __future__ import annotations

from torch import nn

from qkd.losses import cross_entropy_loss
from qkd.training.job import Batch, Step, StepResult


def supervised_step(model: nn.Module, *, label_smoothing: float = 0.0) -> Step:
    """Return the step that trains ``model`` on the labels alone.

    Args:
        model: Returns logits ``[batch, classes]``.
        label_smoothing: Share of the label spread over all classes, in ``[0, 1)``.

    Returns:
        A function of a batch; its loss is a scalar in nats.
    """

    def step(batch: Batch) -> StepResult:
        logits = model(batch.images).float()
        other = (None, None) if batch.mixed is None else (batch.mixed.labels, batch.mixed.share)
        loss = cross_entropy_loss(logits, batch.labels, *other, label_smoothing=label_smoothing)
        return StepResult(loss=loss, terms={"cross_entropy": loss}, logits=logits)

    return step
