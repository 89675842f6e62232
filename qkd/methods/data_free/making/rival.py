"""The student as an opponent: what it makes of images that are moved against it, with a gradient for the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantizers import Student, unquantized
from quantizers.modes import statistics_kept


@dataclass(frozen=True)
class Answer:
    """What a student makes of a batch.

    Args:
        logits: Shape ``[batch, classes]``, with the images' graph.
        low_bit: Of the student that will be used, to be told beside them; the same tensor where it is that one.
    """

    logits: Tensor
    low_bit: Tensor


@dataclass(frozen=True)
class Rival:
    """A student that images are moved against; nothing of it changes but, in training mode, its batch norm.

    Args:
        student: Low-bit, or its float twin.
        form: ``ste``: the low-bit one, the gradient straight through its grids; ``fp_shadow``: its float weights and
            activations in float, quantizers off. The low-bit student then sees the images, too: it alone moves batch
            norm, whose statistics shall be those of the student that is used.
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
    """Return the loss of what is moved, shape ``[]``; against a student in float also that against the low-bit one.

    Args:
        name: Of the loss in the metrics.
        losses: Both, shape ``[2]``.
        form: Of :class:`Rival`.
    """
    own, low_bit = losses.clone().unbind()
    return {name: own, **({f"{name}_low_bit": low_bit} if form == "fp_shadow" else {})}
