"""A teacher that is the average of several nets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from qkd.losses.checks import check_choice, check_temperature
from qkd.training.supervised import LogitsGuard

Space = Literal["logit", "probability"]
SPACES: tuple[Space, ...] = ("logit", "probability")


class EnsembleTeacher(nn.Module):
    """Several nets of one data set as one teacher: its logits are those of their average.

    It has no features: features of nets with different seeds do not correspond, so feature losses
    cannot read it.

    Args:
        models: At least one; each gives logits ``[batch, classes]``.
        space: The average: :func:`mean_probability_logits` or :func:`mean_logits`.
        temperature: Temperature of the averaged probabilities; not used by ``logit``.

    Raises:
        ValueError: If there are no models, ``space`` is unknown, or ``temperature`` is not positive and finite.

    References:
        Allen-Zhu, Li, `Toward Understanding Ensemble, Knowledge Distillation and Self-Distillation in Deep Learning
        <https://arxiv.org/abs/2012.09816>`_, 2020: an unweighted average of nets that differ by seed only.
    """

    def __init__(self, models: Sequence[nn.Module], space: Space = "probability", *, temperature: float = 1.0) -> None:
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model, got none")
        check_choice("space", space, SPACES)
        check_temperature(temperature)
        self.members = nn.ModuleList(models)
        self.space, self.temperature = space, temperature
        self._guards = [LogitsGuard(f"the teacher's member {number}") for number in range(1, len(models) + 1)]

    @property
    def without_features(self) -> str:
        """Return why no loss can read its features."""
        return (
            f"the teacher is an ensemble of {len(self.members)} nets: it has no features and no last layer of its "
            f"own; use losses on logits, or teacher.members: 1"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of the average; for copies of one net, exactly that net's.

        Raises:
            ValueError: If a member's first outputs are probabilities.
        """
        logits = [member(x) for member in self.members]
        for guard, one in zip(self._guards, logits, strict=True):
            guard(one)
        if self.space == "logit":
            return mean_logits(logits)
        return mean_probability_logits(logits, temperature=self.temperature)


def mean_logits(logits: Sequence[Tensor]) -> Tensor:
    r"""Return the mean of several nets' logits.

    .. math:: \bar z = z_0 + \frac1n \sum_i (z_i - z_0)

    Args:
        logits: At least one, each ``[batch, classes]``.

    Returns:
        Shape ``[batch, classes]``; if all are equal, exactly these (a sum divided by n would round).

    Raises:
        ValueError: If there are none, or their shapes differ.

    Example:
        >>> mean_logits([torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])]).tolist()
        [[2.0, 0.0]]
    """
    first = _check(logits)
    if len(logits) == 1:
        return first
    return first + torch.stack([other - first for other in logits[1:]]).sum(0) / len(logits)


def mean_probability_logits(logits: Sequence[Tensor], *, temperature: float = 1.0) -> Tensor:
    r"""Return logits of the mean of several nets' probabilities.

    .. math:: z = \tau \ln \frac1n \sum_i \sigma(z_i / \tau) + c

    so that :math:`\sigma(z / \tau)` is the mean of the probabilities at temperature :math:`\tau`; the constant c of
    each row is chosen so that equal logits come back unchanged.

    Soft targets with their own temperature T soften *this* mean: with :math:`\tau = 1`, the ensemble's predictions are
    averaged first and then softened, :math:`\sigma(z / T) \propto \bar p^{1 / T}`; with :math:`\tau = T` they are the
    mean of the softened probabilities. As :math:`\tau` grows, the mean becomes that of the logits.

    Args:
        logits: At least one, each ``[batch, classes]``.
        temperature: :math:`\tau > 0`.

    Returns:
        Shape ``[batch, classes]``; if all are equal, exactly these.

    Raises:
        ValueError: If there are none, their shapes differ, or ``temperature`` is not positive and finite.

    Note:
        Computed from logarithms, relative to the largest of each entry: nothing overflows, and classes that every
        member rules out keep their order.

    Example:
        >>> sure = [torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])]
        >>> mean_probability_logits(sure).softmax(1).tolist()
        [[0.5, 0.5]]
    """
    first = _check(logits)
    check_temperature(temperature)
    if len(logits) == 1:
        return first
    logs = torch.stack([(one / temperature).log_softmax(1) for one in logits])
    largest = logs.detach().amax(0)
    mean = (logs - largest).exp().mean(0).log() + (largest - logs[0])  # relative to the first: 0 where all are equal
    return first + temperature * mean


def _check(logits: Sequence[Tensor]) -> Tensor:
    if not logits:
        raise ValueError("needs the logits of at least one model, got none")
    first = logits[0]
    shapes = [tuple(one.shape) for one in logits]
    if first.dim() != 2 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"members need logits of the same shape [batch, classes], got {', '.join(map(str, shapes))}")
    return first
