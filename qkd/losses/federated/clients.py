"""Losses that keep clients together without a generator: distance to the global weights, and class mean logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_labels, check_temperature, check_weight
from qkd.losses.stable import in_full_precision


@in_full_precision
def proximal_loss(parameters: Sequence[Tensor], global_parameters: Sequence[Tensor], *, mu: float) -> Tensor:
    r"""Return FedProx's penalty on how far a client has moved from the weights that the server sent.

    .. math:: L = \frac{\mu}{2} \sum_i \|w_i - w_i^\mathrm{global}\|^2

    Args:
        parameters: :math:`w`, the client's, floating, of any shapes.
        global_parameters: The global ones, of the same shapes. Constants: no gradient flows into them.
        mu: :math:`\mu`, not negative.

    Returns:
        A scalar, shape ``[]``; 0 where nothing has moved.

    Raises:
        ValueError: If there are none, their numbers or shapes differ, or ``mu`` is negative.

    References:
        Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2020,
        equation 2.

    Example:
        >>> proximal_loss([torch.tensor([3.0])], [torch.tensor([1.0])], mu=0.5).item()
        1.0
    """
    check_weight(mu=mu)
    shapes = [[tuple(one.shape) for one in side] for side in (parameters, global_parameters)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(f"needs parameters of the same shapes, at least one, got {shapes[0]} and {shapes[1]}")
    moved = [(own - fixed.detach()).square().sum() for own, fixed in zip(parameters, global_parameters, strict=True)]
    return 0.5 * mu * torch.stack(moved).sum()


@in_full_precision
def class_mean_logits(logits: Tensor, labels: Tensor, *, classes: int) -> tuple[Tensor, Tensor]:
    """Return the mean logits of the images of each class, and how many images that were.

    Args:
        logits: Shape ``[batch, classes]``, floating.
        labels: Int64, shape ``[batch]``.
        classes: Number of classes.

    Returns:
        Means ``[classes, classes]``, of the logits' dtype, at least float32, one row per class, 0 for a class without
        images; and counts ``[classes]``, int64.

    Raises:
        ValueError: If shapes or labels do not fit.

    References:
        Jeong et al., `Communication-Efficient On-Device Machine Learning <https://arxiv.org/abs/1811.11479>`_, 2018,
        section 2.

    Example:
        >>> class_mean_logits(torch.tensor([[1.0, 3.0], [3.0, 5.0]]), torch.tensor([1, 1]), classes=2)
        (tensor([[0., 0.],
                [2., 4.]]), tensor([0, 2]))
    """
    check_labels(logits, labels)
    if logits.shape[1] != classes:
        raise ValueError(f"needs logits of {classes} classes, got {tuple(logits.shape)}")
    members = functional.one_hot(labels, classes).to(logits.dtype)
    counts = torch.bincount(labels, minlength=classes)
    means = members.T @ logits / counts.clamp_min(1)[:, None]
    return means, counts


@in_full_precision
def class_logits_loss(
    student_logits: Tensor,
    labels: Tensor,
    class_logits: Tensor,
    class_weights: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""Return the divergence of logits from the mean logits of all clients for the images' classes.

    .. math:: L = \tau^2 \frac1n \sum_b w_{y_b}\, \mathrm{KL}(\sigma(t_{y_b} / \tau) \,\|\, \sigma(z_b / \tau))

    Args:
        student_logits: :math:`z`, shape ``[batch, classes]``, floating.
        labels: :math:`y`, int64, shape ``[batch]``.
        class_logits: :math:`t`, one row per class, shape ``[classes, classes]``. Constants: no gradient flows into
            them.
        class_weights: :math:`w`, not negative, floating, shape ``[classes]``: 1, or 0 for a class that no client has
            seen, whose images then add nothing. Constants.
        temperature: :math:`\tau > 0`, dimensionless.

    Returns:
        A scalar, shape ``[]``, in nats.

    Raises:
        ValueError: If shapes or labels do not fit, a class weight is negative, or ``temperature`` is not positive.

    References:
        Jeong et al., `Communication-Efficient On-Device Machine Learning <https://arxiv.org/abs/1811.11479>`_, 2018
        (federated distillation). Deviation: they use the cross-entropy, which is larger by the target's entropy, a
        constant.
    """
    check_temperature(temperature)
    check_labels(student_logits, labels)
    classes = student_logits.shape[1]
    if class_logits.shape != (classes, classes) or class_weights.shape != (classes,):
        raise ValueError(
            f"needs class logits [{classes}, {classes}] and class weights [{classes}], got "
            f"{tuple(class_logits.shape)} and {tuple(class_weights.shape)}"
        )
    if class_weights.device.type == "cpu" and bool((class_weights < 0).any()):
        raise ValueError(f"class_weights must not be negative, got {float(class_weights.min())}")
    target = functional.log_softmax(class_logits.detach()[labels].to(student_logits.dtype) / temperature, 1)
    own = functional.log_softmax(student_logits / temperature, 1)
    divergences = functional.kl_div(own, target, reduction="none", log_target=True).sum(1)
    weights = class_weights.detach()[labels].to(divergences.dtype)
    return temperature**2 * (weights * divergences).mean()
