"""How to change a teacher so that a student that follows it for one step does better on a quiz (MetaDistil)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

Order = Literal["second", "first"]
Loss = Callable[[Mapping[str, Tensor]], Tensor]
ORDERS: tuple[Order, ...] = ("second", "first")

# The finite difference of `first` moves the student by this fraction of its weights' norm. DARTS moves it by 0.01 in
# total, which changes hardly any low-bit weight. On ResNet-8 (2 and 4 bit; digits) the direction agrees best with
# `second` here: cosine 0.98 to 1.00 at 0.03, 0.91 to 0.99 at 0.01, below 0.75 at 0.001, where it sees the steps of the
# staircase.
PROBE_SHARE = 0.03


@dataclass(frozen=True)
class MetaGradient:
    """What one step of a student that follows its teacher says about the teacher.

    Args:
        quiz_loss: Quiz loss of the student after the assumed step, shape ``[]``, without graph.
        gradients: Gradients of the quiz loss, by the teacher's tensors, in their order and shapes; zeros for tensors
            that the student's loss does not read.
    """

    quiz_loss: Tensor
    gradients: tuple[Tensor, ...]


def meta_gradient(
    student_loss: Loss,
    quiz_loss: Loss,
    weights: Mapping[str, Tensor],
    teacher: Sequence[Tensor],
    *,
    inner_lr: float,
    order: Order = "second",
    lr_factors: Mapping[str, float] | None = None,
) -> MetaGradient:
    r"""Return the gradient of the quiz loss with respect to the teacher, through one assumed step of the student.

    .. math:: \theta' = \theta - \eta \nabla_\theta l(\theta, \phi),\qquad
              \nabla_\phi Q(\theta') = -\eta\, \nabla_\phi \langle \nabla_\theta l(\theta, \phi), g \rangle,\quad
              g = \nabla_{\theta'} Q

    ``second`` differentiates the student's gradient itself. ``first`` takes central differences of the teacher's first
    gradient instead, so that no backward pass is differentiated:

    .. math:: \nabla_\phi Q \approx -\frac{\eta}{2 \epsilon}
              \big[ \nabla_\phi l(\theta + \epsilon g, \phi) - \nabla_\phi l(\theta - \epsilon g, \phi) \big],\quad
              \epsilon = 0.03\, \|\theta\| / \|g\|

    Args:
        student_loss: :math:`l`: gives the student's loss, shape ``[]``, for the weights given; its graph
            reaches the teacher's tensors. The same random numbers at every call.
        quiz_loss: :math:`Q`, likewise; it does not read the teacher.
        weights: :math:`\theta`, by name, including step sizes of quantizers; only their values are read.
        teacher: :math:`\phi`, leaves that require a gradient.
        inner_lr: :math:`\eta \ge 0`.
        order: ``second`` (exact) or ``first`` (finite differences).
        lr_factors: Name of a weight -> factor on its :math:`\eta`; 1 by default.

    Returns:
        The quiz loss, and its gradient with respect to each of the teacher's tensors.

    Raises:
        ValueError: If ``inner_lr`` is negative or not finite, ``order`` is unknown, ``lr_factors`` names something
            that is not a weight, or the loss does not depend on the teacher.

    References:
        Zhou, Xu, McAuley, `BERT Learns to Teach: Knowledge Distillation with Meta Learning
        <https://arxiv.org/abs/2106.04570>`_, 2022, algorithm 1; Liu, Simonyan, Yang, `DARTS
        <https://arxiv.org/abs/1806.09055>`_, 2019, equations 7 and 8 (the finite difference).

    Note:
        The finite difference is relative to the student's weights; in DARTS it is absolute. Through a low-bit student
        it sees the staircase itself, where ``second`` follows the straight-through estimate.
    """
    factors = dict(lr_factors or {})
    _check(weights, inner_lr, order, factors)
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = student_loss(leaves)
    slopes = _gradients(loss, leaves, graph=order == "second")
    rates = {name: inner_lr * factors.get(name, 1.0) for name in leaves}
    assumed = {
        name: (leaf.detach() - rates[name] * slopes[name].detach() if name in slopes else leaf.detach())
        for name, leaf in leaves.items()
    }
    quiz, directions = _quiz(quiz_loss, assumed)
    # A weight that the loss or the quiz does not read carries nothing between them.
    steps = {name: rates[name] * directions[name] for name in slopes if name in directions}
    if order == "second":
        gradients = _differentiated(slopes, steps, teacher)
    else:
        gradients = _differenced(student_loss, leaves, steps, inner_lr, teacher)
    return MetaGradient(quiz, gradients)


def _check(weights: Mapping[str, Tensor], inner_lr: float, order: str, factors: Mapping[str, float]) -> None:
    if not (math.isfinite(inner_lr) and inner_lr >= 0):
        raise ValueError(f"inner_lr must not be negative or infinite, got {inner_lr=}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    strange = sorted(factors.keys() - weights.keys())
    if strange:
        raise ValueError(f"lr_factors has names that are not weights of the student: {', '.join(strange[:3])}")


def _gradients(loss: Tensor, leaves: Mapping[str, Tensor], *, graph: bool) -> dict[str, Tensor]:
    """Return the gradients by name, except for weights that are not read."""
    # The graph is kept either way: the teacher's half of it is used later.
    found = torch.autograd.grad(
        loss, tuple(leaves.values()), create_graph=graph, retain_graph=True, allow_unused=True
    )  # fmt: skip
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _quiz(quiz_loss: Loss, assumed: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {name: weight.requires_grad_() for name, weight in assumed.items()}
    loss = quiz_loss(leaves)
    found = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True)
    return loss.detach(), {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}


def _differentiated(
    slopes: Mapping[str, Tensor], steps: Mapping[str, Tensor], teacher: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Return minus the gradient with respect to the teacher of (student's gradient . steps)."""
    names = [name for name in steps if slopes[name].requires_grad]
    if not names:
        raise _independent()
    found = torch.autograd.grad(
        [slopes[name] for name in names], tuple(teacher), [-steps[name] for name in names], allow_unused=True
    )
    return _filled(found, teacher)


def _differenced(
    student_loss: Loss,
    leaves: Mapping[str, Tensor],
    steps: Mapping[str, Tensor],
    inner_lr: float,
    teacher: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Return the same from the teacher's first gradients at both sides of the student's weights."""
    size = get_total_norm([leaves[name].detach() for name in steps])
    length = get_total_norm(list(steps.values()))
    # There is nothing to learn if the quiz gradient is zero, or the step is (inner_lr 0).
    epsilon = float(PROBE_SHARE * size / length) if float(length) > 0 else 0.0
    if inner_lr == 0 or not epsilon > 0:
        return tuple(torch.zeros_like(tensor) for tensor in teacher)
    ahead, behind = (
        student_loss({name: _moved(leaf, steps.get(name), way * epsilon) for name, leaf in leaves.items()})
        for way in (1, -1)
    )
    change = ahead - behind
    if not change.requires_grad:
        raise _independent()
    found = torch.autograd.grad(change, tuple(teacher), allow_unused=True)
    return _filled([None if one is None else one * (-0.5 / epsilon) for one in found], teacher)


def _moved(leaf: Tensor, step: Tensor | None, share: float) -> Tensor:
    return leaf.detach() if step is None else leaf.detach() + share * step


def _filled(found: Sequence[Tensor | None], teacher: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if all(gradient is None for gradient in found):
        raise _independent()
    return tuple(
        torch.zeros_like(tensor) if gradient is None else gradient.detach()
        for gradient, tensor in zip(found, teacher, strict=True)
    )


def _independent() -> ValueError:
    return ValueError(
        "the student's loss does not depend on the teacher, so the quiz cannot teach it: add a loss term that reads "
        "the teacher, e.g. soft_target"
    )
