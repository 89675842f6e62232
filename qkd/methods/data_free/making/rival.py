"""The student as an opponent: its outputs for images that are optimized against it, with a gradient for the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantizers import Student, unquantized
from quantizers.modes import statistics_kept


@dataclass(frozen=True)
class Answer:
    """A student's outputs for a batch.

    Args:
        logits: Shape ``[batch, classes]``, with the images' graph.
        low_bit: Logits of the deployed student, for the metrics; the same tensor if that is the student.
    """

    logits: Tensor
    low_bit: Tensor


@dataclass(frozen=True)
class Rival:
    """A student that images are optimized against; only its batch norm changes, in training mode.

    Args:
        student: Low-bit, or its float twin.
        form: ``ste``: the low-bit one, the gradient straight through its grids; ``fp_shadow``: its float weights and
            activations in float, quantizers off. The low-bit student then sees the images, too: it alone updates
            batch norm, whose statistics must be those of the deployed student.
    """

    student: nn.Module
    form: str = "ste"

    def __call__(self, images: Tensor) -> Answer:
        """Return its logits of normalized images."""
        if self.form == "ste" or not isinstance(self.student, Student):
            logits = self.student(images)
            return Answer(logits, logits)
        with torch.no_grad():
            low_bit = self.student(images)
        with unquantized(self.student), statistics_kept(self.student):
            return Answer(self.student(images), low_bit)


def rival_facts(name: str, losses: Tensor, form: str) -> dict[str, Tensor]:
    """Return the loss that is optimized, shape ``[]``; with a float student, also the loss against the low-bit one.

    Args:
        name: Name of the loss in the metrics.
        losses: Both, shape ``[2]``.
        form: Form of :class:`Rival`.
    """
    own, low_bit = losses.clone().unbind()
    return {name: own, **({f"{name}_low_bit": low_bit} if form == "fp_shadow" else {})}
