"""The student as an opponent: what it makes of images that are moved against it, with a gradient for the images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers import Student, unquantized


@dataclass(frozen=True)
class Answer:
    """What a student makes of a batch.

    Args:
        logits: Shape ``[batch, classes]``, with the images' graph.
        low_bit: Of the student as it will be used, to be told beside them; the same tensor where that is what they are.
    """

    logits: Tensor
    low_bit: Tensor


@dataclass(frozen=True)
class Rival:
    """A student that images are moved against; nothing of it changes but, in training mode, its batch norm.

    Args:
        student: Low-bit, or its float twin.
        form: ``ste``: as it is, the gradient straight through its grids; ``fp_shadow``: its float weights and
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


@contextmanager
def statistics_kept(net: nn.Module) -> Iterator[None]:
    """Let batch norm's running statistics stay within a block, in whatever mode a net is."""
    norms = [one for one in net.modules() if isinstance(one, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if count is None else count.clone() for _, count in before]
    try:
        for norm in norms:
            norm.momentum = 0.0  # not a copy put back: autograd holds the statistics until the backward pass
        yield
    finally:
        for norm, (momentum, _), count in zip(norms, before, counts, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)
