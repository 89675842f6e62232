"""A bound on how much one optimizer step can change a step size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from qkd.training.job import Moment


class BoundedStepSizes:
    r"""Keeps each step size near its value before the step: :math:`(1 - b) |s| \le s' \le (1 + b) |s|`.

    The update of a learned step size is not relative to its size: the same learning rate moves 0.03 and 3 by the same
    amount. At rates that suit the weights, a single step can multiply a small one, or carry it through zero. All
    weights of its channel are then rounded to other values at once, the loss jumps, and at 2 bits the training may
    never recover. With a bound, a step size can still halve within seven steps (at 0.1) if the loss calls for it.

    Note:
        It acts after any optimizer, and leaves its momentum alone. Esser et al. scale the gradient (section 2.2), which
        makes steps similar on average; this bounds each single step. It is our own method, not from a paper.

    Args:
        scales: Parameters that are step sizes, of any shape.
        bound: The bound :math:`b`, in ``(0, 1)``.
    """

    name = "step_sizes"

    def __init__(self, scales: Iterable[nn.Parameter], bound: float) -> None:
        self._scales: list[Tensor] = list(scales)
        self._bound, self._before = bound, list[Tensor]()

    @torch.no_grad()
    def before(self, moment: Moment) -> None:
        """Record the step sizes; their magnitudes are what is deployed."""
        self._before = list(torch._foreach_abs(self._scales))

    @torch.no_grad()
    def after(self, moment: Moment) -> None:
        """Clamp step sizes that moved too far to the bound."""
        torch._foreach_maximum_(self._scales, list(torch._foreach_mul(self._before, 1 - self._bound)))
        torch._foreach_minimum_(self._scales, list(torch._foreach_mul(self._before, 1 + self._bound)))

    def facts(self) -> Mapping[str, float]:
        """Return nothing."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return nothing, since it considers only one step."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing."""
