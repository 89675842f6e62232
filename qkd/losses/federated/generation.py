"""FedGen: how a generator of latents learns from clients' last layers, and how clients learn from its latents."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_features, check_labels, check_logits, check_weight
from qkd.losses.data_free.disagreement import disagreement_loss
from qkd.losses.logits import soft_target_loss
from qkd.losses.stable import in_full_precision


def label_shares(label_counts: Tensor) -> Tensor:
    r"""Return the share of each class's images that each client has.

    .. math:: w_{k,y} = n_k(y) / \sum_j n_j(y)

    Args:
        label_counts: :math:`n_k(y)`, images of each class at each client, shape ``[clients, classes]``, not negative.

    Returns:
        Shares in ``[0, 1]``, float64, shape ``[clients, classes]``; columns sum to 1, or are 0 where no client has
        the class.

    Raises:
        ValueError: If the shape is wrong, or a count is negative.

    Example:
        >>> label_shares(torch.tensor([[3, 0], [1, 0]])).tolist()
        [[0.75, 0.0], [0.25, 0.0]]
    """
    if label_counts.dim() != 2 or bool((label_counts < 0).any()):
        raise ValueError(f"needs counts [clients, classes], none negative, got {tuple(label_counts.shape)}")
    counts = label_counts.double()
    totals = counts.sum(0)
    return counts / torch.where(totals > 0, totals, torch.ones_like(totals))


@in_full_precision
def latent_diversity_loss(noise: Tensor, latents: Tensor) -> Tensor:
    r"""Return how similar the latents of different noise are.

    .. math:: L = \exp\Big(-\tfrac{1}{n^2} \sum_{ij} d_2(\epsilon_i, \epsilon_j)\, d_1(z_i, z_j)\Big)

    with :math:`d_2` the mean squared and :math:`d_1` the mean absolute difference of two rows. Pairs of a row with
    itself are counted.

    Args:
        noise: :math:`\epsilon`, what the latents were generated from, shape ``[batch, noise]``, floating.
        latents: :math:`z`, shape ``[batch, ...]``, floating.

    Returns:
        A scalar in (0, 1], shape ``[]``; 1 where all latents are equal.

    Raises:
        ValueError: If both are not batches of one size, at least 1, or have no numbers.

    References:
        Zhu, Hong, Zhou, `Data-Free Knowledge Distillation for Heterogeneous Federated Learning
        <https://arxiv.org/abs/2105.10056>`_ (FedGen), 2021, as in its released code.

    Example:
        >>> latent_diversity_loss(torch.rand(4, 2), torch.ones(4, 3)).item()
        1.0
    """
    check_features(noise, latents)
    rows, inputs = latents.flatten(1), noise.flatten(1)
    apart = (rows[:, None] - rows[None]).abs().mean(2)
    squares = (inputs[:, None] - inputs[None]).square().mean(2)
    return torch.exp(-(squares * apart).mean())


@in_full_precision
def fedgen_generator_loss(
    client_logits: Tensor,
    labels: Tensor,
    shares: Tensor,
    noise: Tensor,
    latents: Tensor,
    *,
    alpha: float = 1.0,
    eta: float = 1.0,
    beta: float = 0.0,
    student_logits: Tensor | None = None,
) -> Tensor:
    r"""Return the loss of FedGen's generator: every client's last layer recognizes the requested class.

    .. math:: L = \alpha \sum_k \frac1n \sum_b w_{k,y_b}\, (-\log \sigma(f_k(z_b))_{y_b})
                  + \eta\, L_\mathrm{diversity}
                  - \beta\, \mathrm{KL}\big(\sigma(\textstyle\sum_k w_{k,y} f_k(z)) \,\|\, \sigma(f(z))\big)

    Args:
        client_logits: :math:`f_k(z)`, shape ``[clients, batch, classes]``, floating.
        labels: :math:`y`, the requested classes, int64, shape ``[batch]``.
        shares: :math:`w_{k,y}` (:func:`label_shares`), floating, shape ``[clients, classes]``. Constants.
        noise: What the latents were generated from, shape ``[batch, noise]``.
        latents: :math:`z`, shape ``[batch, ...]``.
        alpha: Weight of the cross-entropies.
        eta: Weight of :func:`latent_diversity_loss`.
        beta: Weight of the divergence from the server's own student, which the generator seeks; 0 in the paper.
        student_logits: :math:`f(z)` of that student, shape ``[batch, classes]``; needed where ``beta`` is positive.

    Returns:
        A scalar, shape ``[]``, in nats (except for the diversity term).

    Raises:
        ValueError: If shapes or labels do not fit, a weight is negative, or ``beta`` has no ``student_logits``.

    References:
        Zhu, Hong, Zhou, `FedGen <https://arxiv.org/abs/2105.10056>`_, 2021, equation 4, as in its released code.
    """
    check_weight(alpha=alpha, eta=eta, beta=beta)
    is_stack = client_logits.dim() == 3 and len(client_logits) > 0
    if not is_stack or shares.shape != (client_logits.shape[0], client_logits.shape[2]):
        raise ValueError(
            f"needs client logits [clients, batch, classes] of at least one client, and shares [clients, classes], got "
            f"{tuple(client_logits.shape)} and {tuple(shares.shape)}"
        )
    for logits in client_logits:
        check_labels(logits, labels)
    if student_logits is not None:
        check_logits(student_logits, client_logits[0])
    weights = shares.detach().to(client_logits.dtype)[:, labels]
    errors = torch.stack([functional.cross_entropy(logits, labels, reduction="none") for logits in client_logits])
    loss = alpha * (weights * errors).mean(1).sum() + eta * latent_diversity_loss(noise, latents)
    if beta == 0:
        return loss
    if student_logits is None:
        raise ValueError(f"beta is {beta}: the divergence from a student needs student_logits")
    mixture = (weights[:, :, None] * client_logits).sum(0)
    return loss + beta * disagreement_loss(student_logits, mixture)


@in_full_precision
def fedgen_client_loss(
    student_logits: Tensor,
    labels: Tensor,
    generated_logits: Tensor,
    generated_labels: Tensor,
    target_logits: Tensor,
    *,
    weight: float,
) -> Tensor:
    r"""Return the loss of a client that follows FedGen's generator.

    .. math:: L = H(y, \sigma(f(x))) + \frac{m}{n} a\, H(y', \sigma(f(G(y'))))
                  + a\, \mathrm{KL}(\sigma(f(G(y))) \,\|\, \sigma(f(x)))

    Args:
        student_logits: :math:`f(x)`, of the client's images, shape ``[n, classes]``, floating.
        labels: :math:`y`, of the images, int64, shape ``[n]``.
        generated_logits: :math:`f(G(y'))`: the client's last layer on latents, shape ``[m, classes]``.
        generated_labels: :math:`y'`, the requested classes, int64, shape ``[m]``.
        target_logits: :math:`f(G(y))`, of latents with the images' own classes, shape ``[n, classes]``. A constant:
            no gradient flows into it.
        weight: :math:`a` (:func:`fedgen_weight`).

    Returns:
        A scalar, shape ``[]``, in nats.

    Raises:
        ValueError: If shapes or labels do not fit, or ``weight`` is negative.

    References:
        Zhu, Hong, Zhou, `FedGen <https://arxiv.org/abs/2105.10056>`_, 2021, equation 5, as in its released code.
    """
    check_weight(weight=weight)
    check_labels(student_logits, labels)
    check_labels(generated_logits, generated_labels)
    share = len(generated_labels) / len(labels)
    own = functional.cross_entropy(student_logits, labels)
    generated = functional.cross_entropy(generated_logits, generated_labels)
    divergence = soft_target_loss(student_logits, target_logits, temperature=1.0)
    return own + share * weight * generated + weight * divergence


def fedgen_weight(rounds_done: int, *, start: float = 10.0, decay: float = 0.98, least: float = 1e-4) -> float:
    """Return the weight of what a client learns from latents: ``start * decay ** rounds_done``, at least ``least``.

    Args:
        rounds_done: Rounds before this one, from 0.
        start: Weight of the first round.
        decay: Factor per round, in ``(0, 1]``.
        least: Lower bound, unless ``start`` is below it: 0 switches the loss off.

    Returns:
        The weight.

    Raises:
        ValueError: If ``rounds_done`` is negative, ``decay`` is not in ``(0, 1]``, or a weight is negative or not
            finite.

    Example:
        >>> fedgen_weight(0), fedgen_weight(1)
        (10.0, 9.8)
    """
    check_weight(start=start, least=least)
    if rounds_done < 0 or not 0 < decay <= 1:
        raise ValueError(f"needs rounds from 0 and a decay in (0, 1], got {rounds_done=}, {decay=}")
    return max(start * decay**rounds_done, min(start, least))
