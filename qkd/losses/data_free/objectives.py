"""Each method's full loss of a generator or an image: published sums of the losses in this package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkd.losses.checks import check_features, check_scalar, check_weight
from qkd.losses.data_free.disagreement import competition_loss, disagreement_loss
from qkd.losses.data_free.diversity import exponential_increment, image_diversity_loss, mode_seeking_loss
from qkd.losses.data_free.image_priors import total_variation_loss
from qkd.losses.data_free.outputs import class_balance_loss, feature_activation_loss, one_hot_loss
from qkd.losses.logits import cross_entropy_loss, soft_target_loss
from qkd.losses.stable import in_full_precision, row_norms


class RdskdLoss(NamedTuple):
    """RDSKD's loss of a generator, and the parts whose increments it penalizes.

    Args:
        total: The loss to minimize, shape ``[]``.
        authenticity: :func:`one_hot_loss`, shape ``[]``.
        balance: :func:`class_balance_loss`, natural logarithm, shape ``[]``.
        diversity: :func:`image_diversity_loss`, shape ``[]``.
    """

    total: Tensor
    authenticity: Tensor
    balance: Tensor
    diversity: Tensor


@in_full_precision
def rdskd_generator_loss(
    images: Tensor,
    teacher_logits: Tensor,
    *,
    authenticity_reference: Tensor | float = 0.0,
    balance_reference: Tensor | float = 0.0,
) -> RdskdLoss:
    r"""Return RDSKD's generator loss: no weights, but exponential penalties on increments.

    .. math:: L_G = e^{L_a - L_a'} + e^{L_c - L_c'} + L_d

    Args:
        images: Generated, shape ``[batch, ...]``, an even number: the halves of one forward pass.
        teacher_logits: Logits of these images, shape ``[batch, classes]``.
        authenticity_reference: :math:`L_a'`: the loss near the start of the epoch; 0 at first. A constant.
        balance_reference: :math:`L_c'`, likewise.

    Returns:
        The sum and its three parts; ``2 + diversity`` where both references are the losses themselves.

    Raises:
        ValueError: If the shapes do not fit, there are fewer than two classes, or the batch is not even.

    References:
        Han et al., Robustness and Diversity Seeking Data-Free Knowledge Distillation, ICASSP 2021.
    """
    authenticity, balance = one_hot_loss(teacher_logits), class_balance_loss(teacher_logits)
    diversity = image_diversity_loss(images, teacher_logits)
    grown = (
        exponential_increment(authenticity, authenticity_reference),
        exponential_increment(balance, balance_reference),
    )
    return RdskdLoss(grown[0] + grown[1] + diversity, authenticity, balance, diversity)


@in_full_precision
def dafl_generator_loss(
    teacher_logits: Tensor,
    teacher_feature: Tensor,
    *,
    one_hot_weight: float = 1.0,
    balance_weight: float = 5.0,
    activation_weight: float = 0.1,
    base: str = "10",
) -> Tensor:
    r"""Return DAFL's generator loss: one-hot outputs, balanced classes, large features.

    .. math:: L = w_{oh} L_{oh} + w_{ie} L_{ie} + w_a L_{act}

    Args:
        teacher_logits: Logits of generated images, shape ``[batch, classes]``.
        teacher_feature: The input to the teacher's last layer, shape ``[batch, ...]``.
        one_hot_weight: :math:`w_{oh}`.
        balance_weight: :math:`w_{ie}`.
        activation_weight: :math:`w_a`.
        base: Base of the balance's logarithm; DAFL's is 10.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, there are fewer than two classes, a weight is negative or not finite, or
            ``base`` is unknown.

    References:
        Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_, 2019.
    """
    check_weight(one_hot_weight=one_hot_weight, balance_weight=balance_weight, activation_weight=activation_weight)
    check_features(teacher_feature, teacher_logits)
    return (
        one_hot_weight * one_hot_loss(teacher_logits)
        + balance_weight * class_balance_loss(teacher_logits, base=base)
        + activation_weight * feature_activation_loss(teacher_feature)
    )


@in_full_precision
def mskd_generator_loss(
    images: Tensor, latents: Tensor, teacher_logits: Tensor, teacher_feature: Tensor, *, diversity_weight: float = 1.0
) -> Tensor:
    """Return MSKD's generator loss, in our reading: DAFL's with MSGAN's mode seeking.

    Its formula was not available to us; the method appears only in RDSKD's comparison.

    Args:
        images: Generated, shape ``[batch, ...]``, an even number.
        latents: What they were generated from, shape ``[batch, ...]``.
        teacher_logits: Shape ``[batch, classes]``.
        teacher_feature: The input to the teacher's last layer, shape ``[batch, ...]``.
        diversity_weight: Weight of :func:`mode_seeking_loss`.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, there are fewer than two classes, the batch is not even, or the weight is
            negative or not finite.
    """
    check_weight(diversity_weight=diversity_weight)
    check_features(images, teacher_logits)
    return dafl_generator_loss(teacher_logits, teacher_feature) + diversity_weight * mode_seeking_loss(images, latents)


@in_full_precision
def dfq_generator_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    statistics: Tensor,
    *,
    adversarial_weight: float = 1.0,
    statistics_weight: float = 1.0,
    one_hot_weight: float = 1.0,
    balance_weight: float = 20.0,
) -> Tensor:
    """Return DFQ's generator loss: disagreement, batch-norm statistics, one-hot outputs, balanced classes.

    Args:
        student_logits: Logits of generated images, shape ``[batch, classes]``.
        teacher_logits: Same shape.
        statistics: :func:`batch_norm_loss`, form ``norms``, shape ``[]``.
        adversarial_weight: Weight of :func:`disagreement_loss` (a divergence, mean over the batch).
        statistics_weight: Weight of the statistics.
        one_hot_weight: Weight of :func:`one_hot_loss`.
        balance_weight: Weight of :func:`class_balance_loss`, natural logarithm.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, there are fewer than two classes, or a weight is negative or not finite.

    References:
        Choi et al., `Data-Free Network Quantization With Adversarial Knowledge Distillation
        <https://arxiv.org/abs/2005.04136>`_, 2020.
    """
    check_weight(
        adversarial_weight=adversarial_weight,
        statistics_weight=statistics_weight,
        one_hot_weight=one_hot_weight,
        balance_weight=balance_weight,
    )
    check_scalar(statistics=statistics)
    return (
        adversarial_weight * disagreement_loss(student_logits, teacher_logits)
        + statistics_weight * statistics
        + one_hot_weight * one_hot_loss(teacher_logits)
        + balance_weight * class_balance_loss(teacher_logits)
    )


@in_full_precision
def gdfq_generator_loss(
    teacher_logits: Tensor, labels: Tensor, statistics: Tensor, *, statistics_weight: float = 0.1
) -> Tensor:
    """Return GDFQ's loss of a conditional generator: the requested class, and batch-norm statistics.

    Args:
        teacher_logits: Logits of generated images, shape ``[batch, classes]``.
        labels: The classes they were generated for, int64, shape ``[batch]``.
        statistics: :func:`batch_norm_loss`, form ``squares``, shape ``[]``.
        statistics_weight: Weight of the statistics.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, labels are not valid classes, or the weight is negative or not finite.

    References:
        Xu et al., `Generative Low-bitwidth Data Free Quantization <https://arxiv.org/abs/2003.03603>`_, 2020.
    """
    check_weight(statistics_weight=statistics_weight)
    check_scalar(statistics=statistics)
    return cross_entropy_loss(teacher_logits, labels) + statistics_weight * statistics


@in_full_precision
def gdfq_student_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 20.0,
    divergence_weight: float = 1.0,
) -> Tensor:
    r"""Return GDFQ's student loss: the requested labels, and soft targets.

    .. math:: L = \mathrm{CE}(z_s, y) + \alpha\, \tau^2\, \frac{1}{B K} \sum_{b,k} \mathrm{KL}_{bk}

    The divergence is divided by batch *times classes*, as the released code does.

    Args:
        student_logits: Shape ``[batch, classes]``, floating.
        teacher_logits: Same shape. Treated as a constant.
        labels: Classes that the images were generated for, int64, shape ``[batch]``.
        temperature: :math:`\tau > 0`.
        divergence_weight: :math:`\alpha`.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, labels are not valid classes, or a number is out of range.

    References:
        Xu et al., `Generative Low-bitwidth Data Free Quantization <https://arxiv.org/abs/2003.03603>`_, 2020.
    """
    check_weight(divergence_weight=divergence_weight)
    soft = soft_target_loss(student_logits, teacher_logits, temperature=temperature, reduction="mean")
    return cross_entropy_loss(student_logits, labels) + divergence_weight * soft


@in_full_precision
def deep_inversion_loss(
    images: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    student_logits: Tensor | None = None,
    *,
    variation_weight: float = 2.5e-5,
    statistics_weight: float = 10.0,
    norm_weight: float = 0.0,
    competition_weight: float = 0.0,
) -> Tensor:
    r"""Return DeepInversion's loss of images; given a student's logits and a weight for them, its adaptive form.

    .. math:: L = \mathrm{CE}(T(x), y) + a_{tv} L_{tv} + a_{bn} R + a_{l2} \|x\|_2 + a_c (1 - \mathrm{JS})

    Args:
        images: :math:`x`, shape ``[batch, channels, height, width]``, floating.
        teacher_logits: Shape ``[batch, classes]``.
        labels: Requested classes, int64, shape ``[batch]``.
        statistics: :math:`R`, :func:`batch_norm_loss`, form ``norms``, shape ``[]``.
        student_logits: Shape ``[batch, classes]``; needed for ``competition_weight``.
        variation_weight: :math:`a_{tv}` of :func:`total_variation_loss`, form ``norms``.
        statistics_weight: :math:`a_{bn}`.
        norm_weight: :math:`a_{l2}` of the norm of the whole batch.
        competition_weight: :math:`a_c` of :func:`competition_loss`.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, labels are not valid classes, ``competition_weight`` has no
            ``student_logits``, or a weight is negative or not finite.

    References:
        Yin et al., `Dreaming to Distill <https://arxiv.org/abs/1912.08795>`_, 2020.
    """
    check_weight(
        variation_weight=variation_weight,
        statistics_weight=statistics_weight,
        norm_weight=norm_weight,
        competition_weight=competition_weight,
    )
    check_scalar(statistics=statistics)
    check_features(images, teacher_logits)
    loss = cross_entropy_loss(teacher_logits, labels) + statistics_weight * statistics
    loss = loss + variation_weight * total_variation_loss(images)
    if norm_weight:
        loss = loss + norm_weight * row_norms(images.flatten())
    if competition_weight and student_logits is None:
        raise ValueError("competition_weight needs student_logits: the adaptive form competes with a student")
    if competition_weight and student_logits is not None:
        loss = loss + competition_weight * competition_loss(student_logits, teacher_logits)
    return loss


@in_full_precision
def cmi_inversion_loss(
    teacher_logits: Tensor,
    labels: Tensor,
    statistics: Tensor,
    contrast: Tensor,
    adversarial: Tensor | None = None,
    *,
    statistics_weight: float = 1.0,
    one_hot_weight: float = 0.5,
    adversarial_weight: float = 0.5,
    contrast_weight: float = 0.8,
) -> Tensor:
    r"""Return CMI's loss of a synthesis: inversion and contrast.

    .. math:: L = a_{bn} R + a_{oh} \mathrm{CE}(T(x), y) + a_{adv} L_{adv} + a_{cr} L_{cr}

    Args:
        teacher_logits: Logits of the global views, shape ``[batch, classes]``.
        labels: Requested classes, int64, shape ``[batch]``.
        statistics: :math:`R`, :func:`batch_norm_loss`, form ``norms``, shape ``[]``.
        contrast: :math:`L_{cr}`, :func:`contrastive_loss`, shape ``[]``.
        adversarial: :math:`L_{adv}`, :func:`decision_adversarial_loss`, shape ``[]``. None if there is no student.
        statistics_weight: :math:`a_{bn}`.
        one_hot_weight: :math:`a_{oh}`; 1 without a student.
        adversarial_weight: :math:`a_{adv}`.
        contrast_weight: :math:`a_{cr}`.

    Returns:
        A scalar, shape ``[]``.

    Raises:
        ValueError: If the shapes do not fit, labels are not valid classes, or a weight is negative or not finite.

    References:
        Fang et al., `Contrastive Model Inversion <https://arxiv.org/abs/2105.08584>`_, 2021.
    """
    check_weight(
        statistics_weight=statistics_weight,
        one_hot_weight=one_hot_weight,
        adversarial_weight=adversarial_weight,
        contrast_weight=contrast_weight,
    )
    check_scalar(statistics=statistics, contrast=contrast)
    if adversarial is not None:
        check_scalar(adversarial=adversarial)
    loss = statistics_weight * statistics + one_hot_weight * cross_entropy_loss(teacher_logits, labels)
    opposed = torch.zeros_like(loss) if adversarial is None else adversarial_weight * adversarial
    return loss + opposed + contrast_weight * contrast
