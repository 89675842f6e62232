"""A learning rate for low-bit weights that keeps the share of weights that change their code at a target."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from qkd.training.job import Moment
from quantizers.recipes.codes import LowBitLayer, weight_codes

GROUP = "low-bit weights"  # role of their optimizer groups
LONGEST_WINDOW = 100  # steps; the published momentum of the running rate is 0.99
WINDOWS = 20  # minimum per training: the rate has to follow a schedule that falls to zero
DAMPED = 0.25  # control gain times window: the fastest without oscillation if speed is proportional to rate
MOST = 4.0  # times the schedule's peak: if the target is out of reach, an ever-growing rate breaks the training


class TransitionRate:
    r"""Finds the learning rate :math:`U` of low-bit weights from how many of them change their code.

    .. math:: K^t = m K^{t-1} + (1 - m) k^t,\qquad U^t = \max(0, U^{t-1} + \eta (R^t - K^t))

    :math:`k^t` is the share of the weights that step :math:`t` moved to another code. :math:`R^t` is the target: the
    given rate times the schedule over its peak, so that it warms up and falls like all other learning rates.

    Note:
        The published momentum is a constant for trainings of hundreds of epochs. Here the window
        :math:`1 / (1 - m)` is at most a twentieth of the training, :math:`\eta` is the peak rate over the target times
        a quarter of a window, so that it suits any target, and :math:`U` is at most four times the peak: all for
        trainings of a few epochs, in which the published control does not settle. Phases with frozen batch norm keep
        the schedule's own rate, since a higher one breaks them.

    Args:
        layers: Module path -> layer, at the start of the training.
        optimizer: Its groups with role ``GROUP`` hold these weights and nothing else.
        rate: The target at the schedule's peak, in ``(0, 1)``.

    References:
        Lee, Kim, Jeon, Ham, `Transition Rate Scheduling for Quantization-Aware Training
        <https://arxiv.org/abs/2404.19248>`_, 2024 (TRS), section 3.
    """

    name = "transitions"

    def __init__(self, layers: Mapping[str, LowBitLayer], optimizer: Optimizer, rate: float) -> None:
        self._layers, self._optimizer, self._rate = tuple(layers.values()), optimizer, rate
        self._codes = [weight_codes(layer) for layer in self._layers]
        self._weights = max(sum(codes.numel() for codes in self._codes), 1)
        self.running = rate  # K; as if the target were met, since there is no data yet
        self.factor: float | None = None  # U over the schedule's peak; the schedule's own until a step is counted
        self._used = 0.0  # the factor that the last step was taken with

    def before(self, moment: Moment) -> None:
        """Set the rates of the weights' groups."""
        self._used = factor = moment.rate if self.factor is None or moment.settles else self.factor
        for group in self._optimizer.param_groups:  # new objects after a state is loaded
            if group["role"] == GROUP:
                group["lr"] = factor * moment.peak * group["lr_factor"]

    @torch.no_grad()
    def after(self, moment: Moment) -> None:
        """Count the weights that changed their code, and compute the next rate."""
        if all(layer.weight.grad is None for layer in self._layers):  # the step updated something else
            return
        now = [weight_codes(layer) for layer in self._layers]
        changed = torch.stack([(a != b).sum() for a, b in zip(now, self._codes, strict=True)]).sum()
        self._codes = now
        window = max(1.0, min(LONGEST_WINDOW, moment.steps / WINDOWS))
        self.running += (float(changed) / self._weights - self.running) / window
        if moment.settles:
            return
        target = self._rate * moment.rate
        factor = moment.rate if self.factor is None else self.factor
        self.factor = min(max(0.0, factor + DAMPED / window * (target - self.running) / self._rate), MOST)

    def facts(self) -> Mapping[str, float]:
        """Return the running rate, and the learning rate of the last step as a factor of the schedule's peak."""
        return {"transition_rate": self.running, "low_bit_lr_factor": self._used}

    def state(self) -> dict[str, Tensor]:
        """Return the running values; the codes follow from the weights."""
        factor = -1.0 if self.factor is None else self.factor
        return {"values": torch.tensor([self.running, factor, self._used], dtype=torch.float64)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned; the weights are already restored."""
        self.running, factor, *used = tensors["values"].tolist()  # earlier versions did not save what was used
        self.factor = None if factor < 0 else factor
        self._used = used[0] if used else max(factor, 0.0)
        self._codes = [weight_codes(layer) for layer in self._layers]
