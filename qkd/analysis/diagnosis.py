r"""Measure what a teacher's soft targets say about images and class relations, and detect known failures.

:math:`p` is the softmax of the teacher's logits, :math:`\tilde p` that of the logits over the temperature, :math:`t`
the true class, :math:`K` the number of classes. All follow Tang et al., `Understanding and Improving Knowledge
Distillation <https://arxiv.org/abs/2002.03532>`_, 2020; definitions of our own are marked as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses import equivalent_label_smoothing
from qkd.losses.checks import check_labels, check_logits, check_temperature
from qkd.losses.stable import unit_rows

PAIR_VALUES = 4_000_000  # comparisons of two classes in memory at a time

# Thresholds of find_failures: rounded geometric means between groups of teachers, measured on their training images.
# Digits: ResNet-20 of digits/w2a2, two seeds each: plain; label smoothing 0.05, 0.1 and 0.2; over-trained (80 epochs,
# neither augmentation nor weight decay); all fit every image. Fashion-MNIST: ResNet-8, 6 epochs of 10,000 images, one
# seed: plain (84.7 % correct) and label smoothing 0.1 (85.0 %).
#                             digits: plain     over-trained         smoothed     Fashion: plain   smoothed
#   temperature 1
#     std of p_t           2.8e-3..5.1e-3   8.9e-5..1.0e-4   1.7e-2..2.8e-2            0.28       0.26
#     mean of 1 - p_t      5.2e-4..7.0e-4   3.4e-5..4.1e-5   4.4e-2..1.8e-1            0.23       0.30
#     K min p, median      6.4e-9..1.7e-8   3.2e-9..3.4e-9   2.4e-2..1.5e-1          3.6e-5     2.9e-2
#     relation information     0.92..1.10       0.65..0.75   1.6e-3..9.9e-3            0.91       0.42
#   temperature 4
#     std of p_t             0.093..0.103     0.070..0.071     0.007..0.017            0.15       0.06
#     relation information   0.204..0.218     0.143..0.161   1.1e-4..7.0e-4            0.21      0.024
# At temperature 1, the relation information of the smoothed Fashion-MNIST teacher is that of its confusions; at 4, the
# groups separate on both sets. The spread of the correlations falls with smoothing on digits (0.036..0.038 to
# 0.015..0.021), but only from 0.32 to 0.23 on Fashion-MNIST: it also depends on how hard the images are; not used.
SURE_STD = 5e-4  # at temperature 1, between over-trained and plain
SURE_DOUBT = 2e-4  # mean of 1 - p_t at temperature 1, between over-trained and plain
SMOOTHED_SHARE = 1e-3  # K min p at temperature 1, between plain (unsure ones, too) and smoothed
SMOOTHED_RELATION = 0.06  # nats at REFERENCE_TEMPERATURE, between smoothed and all others
REFERENCE_TEMPERATURE = 4.0  # soft enough for classes other than the two most likely to matter
FLAT_STD = 0.034  # at the temperature of the distillation, between smoothed and over-trained on digits


@dataclass(frozen=True)
class Knowledge:
    """What soft targets say at one temperature.

    Args:
        temperature: Dimensionless.
        confidence_mean: Mean of the true class's probability.
        confidence_std: Its standard deviation over the images: the instance level, which weights gradients.
        entropy: Mean entropy, nats.
        instance_information: Mean divergence of an image's distribution from the mean distribution of its class, nats:
            what a table with one distribution per class would lose.
        relation_information: Mean, over the true classes, of the divergence from uniform of a class's mean
            distribution over the wrong classes (normalized), nats: the domain level. Our own.
        relation_spread: Standard deviation of the correlations of two different classes' probabilities over the
            images; 0 if all classes are equally far from one another. Our own: the mean of their absolute values
            is :math:`1 / (K - 1)` for one-hot targets and hardly changes.
        uniform_share: Median over the images of :math:`K \\min_k p_k`: the largest label smoothing that the
            distribution can include. Our own.
        equivalent_smoothing: The label smoothing that is equally unsure of the true class on average.
        within_contrast: Mean correlation of two classes of the same superclass; None without superclasses.
        between_contrast: The same for two classes of different superclasses.
        classes: Number of classes; None if unknown.
    """

    temperature: float
    confidence_mean: float
    confidence_std: float
    entropy: float
    instance_information: float
    relation_information: float
    relation_spread: float
    uniform_share: float
    equivalent_smoothing: float
    within_contrast: float | None = None
    between_contrast: float | None = None
    classes: int | None = None

    @property
    def contrast(self) -> float | None:
        """Return how much more classes of the same superclass correlate than others; None without superclasses."""
        if self.within_contrast is None or self.between_contrast is None:
            return None
        return self.within_contrast - self.between_contrast

    def to_json(self) -> dict[str, float | None]:
        """Return the measures as plain data."""
        return {**asdict(self), "contrast": self.contrast}


def teacher_knowledge(
    logits: Tensor, labels: Tensor, *, temperature: float = 1.0, superclasses: Sequence[int] | None = None
) -> Knowledge:
    """Return what a teacher's soft targets say.

    Args:
        logits: Of the teacher, shape ``[images, classes]``, floating, at least two classes and two images.
        labels: int64, shape ``[images]``.
        temperature: Positive.
        superclasses: Number of each class's superclass; None if there are none.

    Raises:
        ValueError: If shapes do not match, a logit is not finite, or the temperature is out of range.
    """
    _check(logits, labels, temperature)
    classes = logits.shape[1]
    log_p = functional.log_softmax(logits.detach() / temperature, dim=1)
    p = log_p.exp()
    confidence = p.gather(1, labels.unsqueeze(1)).squeeze(1)
    relations = class_relations(logits, temperature=temperature)
    contrast = (None, None) if superclasses is None else relation_contrast(relations, superclasses)
    return Knowledge(
        temperature=temperature,
        confidence_mean=float(confidence.mean()),
        confidence_std=float(confidence.std()),
        entropy=float(-(p * log_p).sum(1).mean()),
        instance_information=float(_instance_information(log_p, labels)),
        relation_information=float(_relation_information(log_p, labels)),
        relation_spread=float(_off_diagonal(relations).std(correction=0)),
        uniform_share=float(classes * p.amin(1).quantile(0.5)),
        equivalent_smoothing=float(equivalent_label_smoothing(logits, labels, temperature=temperature)),
        within_contrast=contrast[0],
        between_contrast=contrast[1],
        classes=classes,
    )


def class_relations(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return the Pearson correlations, over the images, of the probabilities of each pair of classes.

    Args:
        logits: Shape ``[images, classes]``, at least two images.
        temperature: Positive.

    Returns:
        Shape ``[classes, classes]``, in ``[-1, 1]``; 0 for a class whose probability is the same in every image.

    Raises:
        ValueError: If shapes do not fit, a logit is not finite, or the temperature is out of range.
    """
    _check(logits, None, temperature)
    p = functional.softmax(logits.detach() / temperature, dim=1)
    # A constant column minus its mean is 0 except for rounding errors, which scaling to norm 1 would blow up.
    centered = p - p.mean(0)
    noise = torch.finfo(p.dtype).eps * p.amax(0)
    rows = unit_rows(torch.where(centered.abs().amax(0) <= 4 * noise, torch.zeros_like(centered), centered).T)
    return (rows @ rows.T).clamp(-1, 1)


def relation_contrast(relations: Tensor, superclasses: Sequence[int]) -> tuple[float, float]:
    """Return the mean correlation of two classes of the same superclass, and of two classes of different ones.

    Args:
        relations: From :func:`class_relations`, shape ``[classes, classes]``.
        superclasses: Number of each class's superclass.

    Raises:
        ValueError: If there is not one per class, or one of the two kinds has no pairs.
    """
    groups = torch.tensor(list(superclasses), device=relations.device)
    if relations.shape != (len(groups), len(groups)):
        raise ValueError(f"need one superclass per class, got {len(groups)} for relations {tuple(relations.shape)}")
    same = groups.unsqueeze(0) == groups.unsqueeze(1)
    different = ~same
    same.fill_diagonal_(fill_value=False)
    if not bool(same.any()) or not bool(different.any()):
        raise ValueError("superclasses: at least two classes must share one, and at least two must not")
    return float(relations[same].mean()), float(relations[different].mean())


def geometry_agreement(features: Tensor, class_weights: Tensor, logits: Tensor, labels: Tensor) -> float:
    r"""Return the share of pairs of wrong classes that distance orders in the same way as probability.

    The claim: :math:`\lVert h - w_i \rVert < \lVert h - w_j \rVert` exactly if :math:`p_i > p_j`. If the
    weights' rows have the same norm, there is no bias and the logits are the layer's own, it holds for every pair.

    Args:
        features: :math:`h`, the last layer's input, shape ``[images, features]``.
        class_weights: :math:`w`, shape ``[classes, features]``.
        logits: Logits whose order is compared (the same net's, or its teacher's), shape ``[images, classes]``.
        labels: The true classes, which are left out, int64, shape ``[images]``.

    Returns:
        A fraction; 1/2 is the chance level. Ties on either side count half.

    Raises:
        ValueError: If shapes do not match, or there are fewer than three classes (no pair of wrong ones).
    """
    _check(logits, labels, 1.0)
    images, classes = logits.shape
    if features.shape != (images, class_weights.shape[-1]) or class_weights.dim() != 2 or len(class_weights) != classes:
        raise ValueError(
            f"need features [{images}, n] and class weights [{classes}, n], "
            f"got {tuple(features.shape)} and {tuple(class_weights.shape)}"
        )
    if classes < 3:
        raise ValueError(f"needs at least 3 classes to compare two wrong ones, got {classes}")
    agreed = torch.zeros((), dtype=torch.float64, device=logits.device)
    first, second = torch.triu_indices(classes, classes, 1, device=logits.device)
    step = max(1, PAIR_VALUES // len(first))
    for start in range(0, images, step):
        part = slice(start, start + step)
        # |h|^2 is the same for all classes, so 2 h.w - |w|^2 has the same order as nearness
        nearness = 2 * features[part] @ class_weights.T - class_weights.square().sum(1)
        near = (nearness[:, first] - nearness[:, second]).sign()
        likely = (logits[part][:, first] - logits[part][:, second]).sign()
        true = labels[part].unsqueeze(1)
        are_wrong = (first != true) & (second != true)
        agreed += ((1 + near * likely) / 2)[are_wrong].sum(dtype=torch.float64)
    return float(agreed) / (images * (classes - 1) * (classes - 2) / 2)


@dataclass(frozen=True)
class Finding:
    """A known failure that was found.

    Args:
        name: ``over_confident``, ``label_smoothed``, ``wrong_classes_alike`` or ``no_instance_knowledge``.
        sentence: What was found, what it means, what to do.
    """

    name: str
    sentence: str

    def to_json(self) -> dict[str, str]:
        """Return name and sentence."""
        return asdict(self)


def find_failures(
    plain: Knowledge, reference: Knowledge, softened: Knowledge, *, label_smoothing: float | None = None
) -> tuple[Finding, ...]:
    """Return which known failures of distillation a teacher shows; empty if there are none.

    * ``over_confident``: the true class's probability is nearly 1 for every image (Cho and Hariharan 2019). Gradients
      are hardly rescaled at temperature 1.
    * ``label_smoothed``: every class has some probability for every image, and wrong classes are alike: the relations
      between classes have been erased (Mueller et al. 2019). A teacher that has learned little looks the same; it is
      ``wrong_classes_alike`` if it is known to be trained without smoothing. Two classes have no relations to erase.
    * ``no_instance_knowledge``: at the temperature of the distillation, the true class's probability is nearly the same
      for every image, so the teacher does not weight images; often a consequence of one of the others.

    The thresholds, and the teachers on which they were measured (10 classes), are at the top of the module.

    Args:
        plain: Measured at temperature 1.
        reference: At temperature 4, where class relations are judged regardless of the distillation's temperature.
        softened: At the temperature of the distillation.
        label_smoothing: What the teacher was trained with; None if unknown.

    Raises:
        ValueError: If ``plain`` or ``reference`` was measured at another temperature.

    References:
        Cho, Hariharan, `On the Efficacy of Knowledge Distillation <https://arxiv.org/abs/1910.01348>`_, 2019;
        Mueller, Kornblith, Hinton, `When Does Label Smoothing Help? <https://arxiv.org/abs/1906.02629>`_, 2019.
    """
    for name, told, wanted in (("plain", plain, 1.0), ("reference", reference, REFERENCE_TEMPERATURE)):
        if told.temperature != wanted:
            raise ValueError(f"{name} must be at temperature {wanted:g}, got {told.temperature:g}")
    found = []
    doubt = 1 - plain.confidence_mean
    at = f"at temperature {softened.temperature:g}"
    if plain.confidence_std < SURE_STD and doubt < SURE_DOUBT:
        found.append(
            Finding(
                "over_confident",
                f"over-confident teacher: p_t is {plain.confidence_mean:.5f} on average, and nearly the same for every "
                f"image (std {plain.confidence_std:.1e}, below {SURE_STD:g}), so all images have the same weight; "
                f"{at} the std is {softened.confidence_std:.3f}; use a teacher from earlier in its training, a smaller "
                f"one, stronger augmentation, or a higher temperature",
            )
        )
    is_alike = plain.uniform_share > SMOOTHED_SHARE and reference.relation_information < SMOOTHED_RELATION
    if is_alike and plain.classes != 2:
        found.append(_alike(plain, reference, label_smoothing))
    if softened.confidence_std < FLAT_STD:
        found.append(
            Finding(
                "no_instance_knowledge",
                f"no instance knowledge {at}: p_t varies by only {softened.confidence_std:.4f} (std, below "
                f"{FLAT_STD:g}), so soft targets rescale all gradients by the same factor; try another temperature or "
                f"another teacher",
            )
        )
    return tuple(found)


def _alike(plain: Knowledge, reference: Knowledge, smoothing: float | None) -> Finding:
    seen = (
        f"it spreads {plain.uniform_share:.3f} evenly over all classes (more than {SMOOTHED_SHARE:g}) and treats wrong "
        f"classes alike (relation information at temperature {reference.temperature:g} "
        f"{reference.relation_information:.4f} nats, below {SMOOTHED_RELATION:g})"
    )
    if smoothing == 0:
        return Finding(
            "wrong_classes_alike",
            f"unsure teacher: {seen}, although it was trained without label smoothing: it has "
            f"not learned much yet; train it longer, or use a larger one",
        )
    doubt = "" if smoothing else " (one that has not learned much looks the same; in that case, train it longer)"
    return Finding(
        "label_smoothed",
        f"label-smoothed teacher: {seen}: the relations between classes are erased; train it without "
        f"teacher.train.label_smoothing{doubt}",
    )


def _instance_information(log_p: Tensor, labels: Tensor) -> Tensor:
    divergences = []
    for label in torch.unique(labels).tolist():
        rows = log_p[labels == label]
        mean = rows.logsumexp(0) - math.log(len(rows))
        divergences.append((rows.exp() * (rows - mean)).sum(1))
    return torch.cat(divergences).mean()


def _relation_information(log_p: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over true classes of KL(mean distribution over the wrong classes || uniform)."""
    classes = log_p.shape[1]
    values = []
    for label in torch.unique(labels).tolist():
        others = torch.cat([log_p[:, :label], log_p[:, label + 1 :]], dim=1)[labels == label].logsumexp(0)
        log_share = others - others.logsumexp(0)
        values.append((log_share.exp() * (log_share + math.log(classes - 1))).sum())
    return torch.stack(values).mean().clamp_min(0)


def _off_diagonal(square: Tensor) -> Tensor:
    return square[~torch.eye(len(square), dtype=torch.bool, device=square.device)]


def _check(logits: Tensor, labels: Tensor | None, temperature: float) -> None:
    check_logits(logits, logits, least_classes=2)
    check_temperature(temperature)
    if labels is not None:
        check_labels(logits, labels)
    if len(logits) < 2:
        raise ValueError(f"needs at least 2 images to compare, got {len(logits)}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not all finite; was the net trained?")
