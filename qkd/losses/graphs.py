"""MHGD and RKD as role-kd combines them: how images of a batch relate in learned attention, and in logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qkd.losses.checks import check_choice, check_feature_lists, check_logits, check_weight
from qkd.losses.choices import ATTENTIONS, Attention
from qkd.losses.given import given
from qkd.losses.relations import angle_relation_loss
from qkd.losses.singular import CANDIDATES, aligned_pairs, main_direction, vector_divergence
from qkd.losses.stable import distances, in_full_precision, unit_rows

ATTENTION_DECAY = 5e-4
LEAST_DISTANCE = 1e-6  # the root of 1e-12, the floor of squared distances, as published
MEAN_EPSILON = 1e-8


class HeadGraphs(Protocol):
    """What the losses need from :class:`~qkd.terms.head_graph.MultiHeadGraph`."""

    training: bool

    @property
    def is_trained(self) -> bool: ...

    def check_widths(self, widths: Sequence[int], /) -> None: ...

    def adapters(self, features: Sequence[Tensor], /) -> Sequence[Tensor]: ...

    def graphs(self, vectors: Sequence[Tensor], *, learns: bool) -> list[Tensor]: ...

    def predictions(self, graphs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]: ...

    def weights(self) -> list[Tensor]: ...


@in_full_precision
def multi_head_graph_loss(
    student_stages: Sequence[Tensor],
    teacher_stages: Sequence[Tensor],
    *,
    module: HeadGraphs | None = None,
    candidates: int = CANDIDATES,
    attention: Attention = "trained",
    singular_weight: float = 0.0,
) -> Tensor:
    r"""Return how differently student and teacher relate the images of a batch under the same attention (MHGD).

    .. math:: L = \sum_{i \ge 2} \sum_{h, rows} \mathrm{KL}(\sigma(G^s_{ih}) \,\|\, \sigma(G^t_{ih})),\quad
              G_{ih} = \tanh(S_h(v_i) R_h(v_{i-1})^T)

    with v the singular vectors of :func:`~qkd.losses.singular.aligned_vectors`, student first.

    Args:
        student_stages: In network order, at least two, each ``[batch, channels, ...]``, floating.
        teacher_stages: Likewise. Treated as constants.
        module: The attention, the same for both, treated as a constant; it is trained by
            :func:`graph_attention_loss`. Its adapters learn from this loss.
        candidates: Number of the student's singular vectors to consider, at least 1.
        attention: ``trained`` rejects an attention that was never trained. ``random`` allows it: role-kd's
            released code discards the attention's training step, so it compares graphs in a fixed random projection.
        singular_weight: Weight of :func:`~qkd.losses.singular.singular_vector_loss` of the same vectors, which
            then cost one decomposition instead of two; 1 as role-kd combines them.

    Returns:
        A scalar, shape ``[]``, in nats, a sum over rows and heads as published; not negative.

    Raises:
        ValueError: As for :func:`~qkd.losses.singular.singular_vector_loss`; if there is no module, it should
            be trained but was not, ``attention`` is unknown, or ``singular_weight`` is negative or not finite.

    References:
        Lee, Song, `Graph-based Knowledge Distillation by Multi-head Attention Network
        <https://arxiv.org/abs/1907.02226>`_, 2019.
    """
    check_choice("attention", attention, ATTENTIONS)
    check_weight(singular_weight=singular_weight)
    module = _required(module)
    if attention == "trained" and not module.is_trained:
        raise ValueError(
            "the attention of multi_head_graph was never trained: let a phase with graph_attention (trains: modules) "
            "come first, or set its option `attention` to `random`, as in role-kd's released code"
        )
    students, teachers = aligned_pairs(student_stages, teacher_stages, candidates=candidates, module=module.adapters)
    student_graphs, teacher_graphs = (module.graphs(vectors, learns=False) for vectors in (students, teachers))
    parts = [graph_divergence(*pair) for pair in zip(student_graphs, teacher_graphs, strict=True)]
    loss = torch.stack(parts).sum()
    return loss + singular_weight * vector_divergence(students, teachers) if singular_weight else loss


@in_full_precision
def graph_divergence(student_graph: Tensor, teacher_graph: Tensor) -> Tensor:
    """Return the sum over all rows of KL(softmax of the student's row || of the teacher's).

    Args:
        student_graph: Shape ``[heads, batch, batch]``.
        teacher_graph: Likewise. Treated as a constant.

    Returns:
        A scalar, shape ``[]``, in nats. Zero where both graphs agree.

    Raises:
        ValueError: If the shapes differ.
    """
    if student_graph.shape != teacher_graph.shape:
        raise ValueError(
            f"need graphs of the same shape, got {tuple(student_graph.shape)} and {tuple(teacher_graph.shape)}"
        )
    student, teacher = student_graph.log_softmax(-1), given(teacher_graph).log_softmax(-1)
    return (student.exp() * (student - teacher)).sum()


@in_full_precision
def graph_attention_loss(
    teacher_stages: Sequence[Tensor], *, module: HeadGraphs | None = None, weight_decay: float = ATTENTION_DECAY
) -> Tensor:
    r"""Return how badly the attention predicts the teacher's vectors of a feature from those of the one before.

    .. math:: L = \sum_{i \ge 2} \frac1B \sum_b (1 - \cos(\hat v_i, v_i)) + \lambda \sum w^2

    It trains the attention of MHGD on the teacher alone, before the student is distilled with it.

    Args:
        teacher_stages: In network order, at least two, each ``[batch, channels, ...]``. Constants.
        module: The attention and its estimators. In training mode, batch norm uses the batch's statistics and records
            them, and heads are dropped at random (PyTorch's global generator).
        weight_decay: :math:`\lambda`, on all matrices of attention and estimators.

    Returns:
        A scalar, shape ``[]``; without weight decay, in ``[0, 2]`` for each pair of neighbors.

    Raises:
        ValueError: If there are fewer than two features, batches differ, a training batch has a single image
            (batch norm needs more), there is no module or it is for other widths, or ``weight_decay`` is negative or
            not finite.

    References:
        Lee, Song 2019, as released; the estimator's form is ours.

    Note:
        In a run the optimizer's own weight decay (``train.weight_decay``) acts on these matrices as well.
    """
    check_feature_lists(teacher_stages, teacher_stages, least=2)
    check_weight(weight_decay=weight_decay)
    module = _required(module)
    if module.training and len(teacher_stages[0]) < 2:
        raise ValueError("attention is trained on batch statistics: need at least 2 images in a batch, got 1")
    vectors = [main_direction(feature) for feature in teacher_stages]
    module.check_widths([vector.shape[1] for vector in vectors])
    predicted = module.predictions(module.graphs(vectors, learns=module.training), vectors)
    parts = [1 - (unit_rows(guess) * true).sum(1).mean() for guess, true in zip(predicted, vectors[1:], strict=True)]
    squares = torch.stack([weight.square().sum() for weight in module.weights()]).sum()
    return torch.stack(parts).sum() + weight_decay * squares


@in_full_precision
def logit_relation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, distance_weight: float = 50.0, angle_weight: float = 100.0
) -> Tensor:
    r"""Return how differently the logits of a batch relate to each other: RKD as role-kd applies it.

    .. math:: L = w_d \, \mathrm{mean}\, \ell_1(\psi^s - \psi^t) + w_a \, \mathrm{mean}\, \ell_1(A^s - A^t),\quad
              \psi_{ij} = \frac{D_{ij}}{\mathrm{mean}(D) + 10^{-8}},\quad
              D_{ij} = \sqrt{\max(\|x_i - x_j\|^2, 10^{-12})}

    with Huber's :math:`\ell_1`, :math:`x = z / \|z\|_2`, and A the angles of
    :func:`~qkd.losses.relations.angle_relation_loss`.

    Args:
        student_logits: Shape ``[batch, classes]``. Memory grows with ``batch ** 3``.
        teacher_logits: Same shape. Treated as a constant.
        distance_weight: :math:`w_d`.
        angle_weight: :math:`w_a`.

    Returns:
        A scalar, shape ``[]``; unchanged when an image's logits are scaled.

    Raises:
        ValueError: If shapes differ or are not ``[batch, classes]``, or a weight is negative or not finite.

    References:
        Park et al. 2019, equations 5 to 11, on logits as in role-kd's released code.

    Note:
        The mean is over all pairs, including an image with itself: the floor under the root makes these positive, too.
        :func:`~qkd.losses.relations.distance_relation_loss` leaves them out, as the paper does.
    """
    check_logits(student_logits, teacher_logits)
    check_weight(distance_weight=distance_weight, angle_weight=angle_weight)
    student, teacher = unit_rows(student_logits), unit_rows(given(teacher_logits))
    distance = functional.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher))
    return distance_weight * distance + angle_weight * angle_relation_loss(student, teacher)


def _required(module: HeadGraphs | None) -> HeadGraphs:
    if module is None:
        raise ValueError("needs its attention as module=: qkd.terms.head_graph.MultiHeadGraph")
    return module


def _relative_distances(rows: Tensor) -> Tensor:
    apart = distances(rows).clamp_min(LEAST_DISTANCE)
    return apart / (apart.mean() + MEAN_EPSILON)
