"""Combine the gradients of task and distillation, so that distillation never outweighs the task in any tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from qkd.engines.engine import current


def clipped_backward(
    task_loss: Tensor,
    distill_loss: Tensor,
    scale: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    *,
    epoch: int,
) -> None:
    r"""Write gradients in which distillation is clipped against the task, parameter by parameter.

    .. math:: g = g_{task} + \mathrm{clip}(g_{distill},\ \|g_{task}\|_2 \, \sigma(\text{epoch}))

    where clip reduces a gradient to a norm and :math:`\sigma` is the logistic function: 0.5, 0.731, 0.881, 0.953 ...
    for epochs 0, 1, 2, 3. So distillation gives the direction, and its weight no longer matters once it is clipped.
    The optimizer adds weight decay.

    Args:
        task_loss: Shape ``[]``; its graph may be shared with the other's.
        distill_loss: Shape ``[]``.
        scale: Multiplies a loss (needed for reduced precision); scales both gradients and the limit equally.
        parameters: The student's parameters, without gradients. Other parameters that the losses reach (e.g. adapters)
            get the plain sum of both gradients.
        epoch: Counted from the first epoch of distillation, from 0.

    Raises:
        ValueError: If ``epoch`` is negative, or a parameter already has a gradient.

    References:
        Lee, Kim, Song 2018 (KD-SVD), as released and as in role-kd.

    Note:
        A parameter that the task does not reach gets no gradient: its limit is zero.
    """
    if epoch < 0:
        raise ValueError(f"epoch must not be negative, got {epoch=}")
    own = [parameter for parameter in parameters if parameter.requires_grad]
    if any(parameter.grad is not None for parameter in own):
        raise ValueError("some parameters already have gradients; call zero_grad before clipped_backward")
    scale(distill_loss).backward(retain_graph=True)  # type: ignore[no-untyped-call]
    wanted = [parameter.grad for parameter in own]
    current().average([gradient for gradient in wanted if gradient is not None])  # the norms are those of whole batches
    for parameter in own:
        parameter.grad = None
    scale(task_loss).backward()  # type: ignore[no-untyped-call]
    current().average([parameter.grad for parameter in own if parameter.grad is not None])
    share = 1 / (1 + math.exp(-epoch))
    for parameter, gradient in zip(own, wanted, strict=True):
        if parameter.grad is not None and gradient is not None:
            parameter.grad += clip_to_norm(gradient, parameter.grad.norm() * share)


def clip_to_norm(gradient: Tensor, limit: Tensor) -> Tensor:
    """Return a gradient scaled down to an L2 norm of ``limit``, or unchanged if its norm is not larger.

    Args:
        gradient: Any shape, floating. Non-finite entries are kept, so that they can be detected.
        limit: Shape ``[]``, not negative.
    """
    norm = gradient.norm()
    factor = torch.where(norm > limit, limit / torch.where(norm > 0, norm, 1), 1)
    return gradient * factor
