"""A bound on what one step of the optimizer may do to a step size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qkd.training.job import Moment


class BoundedStepSizes:
    r"""Keeps each step size near its value before the step: :math:`(1 - b) |s| \le s' \le (1 + b) |s|`.

    A learned step size has no scale in its update: the same learning rate moves one of 0.03 and one of 3 by as much. At
    rates that suit the weights, a single step can then multiply the smaller one, or carry it through zero. All weights
    of its channel are rounded to other values at once, the loss jumps, and in 2 bits the training may never recover.
    With a bound, a step size still halves within seven steps (at 0.1) where that is what the loss wants.

    Note:
        It acts behind the optimizer, whichever that is, and leaves its momentum alone. Esser et al. scale the gradient
        (section 2.2), which makes steps alike on average; this bounds the single one. It is of our making, no paper's.

    Args:
        scales: Parameters that are step sizes, of any shape.
        bound: The part, in ``(0, 1)``.
    """

    name = "step_sizes"

    def __init__(self, scales: Iterable[nn.Parameter], bound: float) -> None:
        self._scales: list[Tensor] = list(scales)
        self._bound, self._before = bound, list[Tensor]()

    @torch.no_grad()
    def before(self, moment: Moment) -> None:
        """Note what step sizes are; what is deployed is their magnitude."""
        self._before = list(torch._foreach_abs(self._scales))

    @torch.no_grad()
    def after(self, moment: Moment) -> None:
        """Bring those that went further back to the bound."""
        torch._foreach_maximum_(self._scales, list(torch._foreach_mul(self._before, 1 - self._bound)))
        torch._foreach_minimum_(self._scales, list(torch._foreach_mul(self._before, 1 + self._bound)))

    def facts(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return nothing: it looks at one step alone."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing."""
