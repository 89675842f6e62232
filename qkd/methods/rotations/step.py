"""HSSAKD: distillation on images in four orientations, through auxiliary branches of class and orientation together.

Every image of a batch is turned by 0, 90, 180 and 270 degrees. A branch on a tapped feature predicts the joint label
``4 * class + orientation``; the branches' predictions are distilled along with the logits. The net's own task,
classification, is learned on upright images only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qkd.config import RotationsConfig
from qkd.losses import branch_soft_target_loss, cross_entropy_loss, joint_label_loss, soft_target_loss
from qkd.losses.turns import turn_images, upright
from qkd.methods.rotations.branched import BranchedNet, BranchedOutput, mean_log_probabilities
from qkd.terms.step import second_labels
from qkd.training.job import Batch, StepResult
from qkd.training.supervised import LogitsGuard

Weighted = tuple[str, float, Callable[[], Tensor]]  # name of a term, its factor, and how to get it


class BranchStep:
    r"""The step that trains the branches of a teacher, either on the unchanged teacher or together with it.

    .. math:: L = \sum_l \mathrm{CE}(a^l(x_{4B}), 4 y + r) \;[\, + \mathrm{CE}(z(x), y)\,]

    Args:
        teacher: Net and branches. If not joint, the net is in eval mode and does not change.
        joint: Whether the net learns, too, from its labels and through the branches.
        label_smoothing: Share of a label spread over all labels.

    References:
        Yang et al., `Hierarchical Self-supervised Augmented Knowledge Distillation
        <https://arxiv.org/abs/2107.13715>`_, 2021.
    """

    def __init__(self, teacher: BranchedNet, *, joint: bool, label_smoothing: float = 0.0) -> None:
        self._teacher, self._joint, self._smoothing = teacher, joint, label_smoothing
        self._guard = LogitsGuard()

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Register the forward hooks for the duration of a block."""
        with self._teacher.tapped():
            yield

    def __call__(self, batch: Batch) -> StepResult:
        """Return the loss, its terms, and logits of the upright images: the branches', or the net's if it learns."""
        given = self._teacher(turn_images(batch.images), backbone_learns=self._joint)
        joint_labels = (
            "joint_labels",
            1.0,
            lambda: joint_label_loss(given.branches, *_labels(batch), label_smoothing=self._smoothing),
        )
        if not self._joint:
            return _result([joint_labels], mean_log_probabilities([upright(joint) for joint in given.branches]))
        self._guard(given.logits)
        return _result([("cross_entropy", 1.0, lambda: self._task(given, batch)), joint_labels], upright(given.logits))

    def _task(self, given: BranchedOutput, batch: Batch) -> Tensor:
        return cross_entropy_loss(upright(given.logits), *_labels(batch), label_smoothing=self._smoothing)


class RotationStep:
    r"""The offline step: a student and its branches learn from a fixed teacher and its trained branches.

    .. math:: L = w_t\,\mathrm{CE}(z_s(x), y) + w_b \sum_l \tau^2\,\mathrm{KL}(a^l_T \,\|\, a^l_S)
              + w_l\,\tau^2\,\mathrm{KL}(z_T \,\|\, z_S)

    The divergences are means over all four orientations. The student's branches never see a joint label: they learn
    only from the teacher's, and their gradients flow into the student.

    Args:
        student: Net and branches; both learn.
        teacher: Has the same number of branches; net and branches are in eval mode and only read.
        config: Temperature and weights; terms of weight zero are left out.
        label_smoothing: Share of a label spread over all classes.
        view: Gives the teacher's images for a batch (normalized float32), turned as the student's; the student's
            own if None.

    Raises:
        ValueError: If the nets have different numbers of branches.

    References:
        Yang et al., `Hierarchical Self-supervised Augmented Knowledge Distillation
        <https://arxiv.org/abs/2107.13715>`_, 2021; Yang et al., `Knowledge Distillation Using Hierarchical
        Self-Supervision Augmented Distribution <https://arxiv.org/abs/2109.03075>`_, 2021.
    """

    def __init__(
        self,
        student: BranchedNet,
        teacher: BranchedNet,
        config: RotationsConfig,
        *,
        label_smoothing: float = 0.0,
        view: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        _require_pairs(student, teacher)
        self._student, self._teacher, self._config = student, teacher, config
        self._smoothing, self._view = label_smoothing, view
        self._guard, self._student_guard = LogitsGuard(), LogitsGuard("the student")

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Register the forward hooks of both nets for the duration of a block."""
        with self._student.tapped(), self._teacher.tapped():
            yield

    def __call__(self, batch: Batch) -> StepResult:
        """Return loss, terms and the student's logits of the upright images."""
        own, images = self._config, turn_images(batch.images)
        student = self._student(images)
        with torch.no_grad():
            teacher = self._teacher(images if self._view is None else turn_images(self._view(batch)))
        self._guard(teacher.logits)
        self._student_guard(student.logits)
        logits = upright(student.logits)
        terms: list[Weighted] = [
            (
                "cross_entropy",
                own.task_weight,
                lambda: cross_entropy_loss(logits, *_labels(batch), label_smoothing=self._smoothing),
            ),
            *_soft_targets(student, teacher, own),
        ]
        return _result(terms, logits)


class PeerStep:
    r"""The online step: two nets with branches, student and peer, learn from labels and from each other.

    For each of the two, with :math:`q` the other's logits, taken as constants:

    .. math:: L = w_t\,\mathrm{CE}(z(x), y) + w_j \sum_l \mathrm{CE}(a^l, 4 y + r)
              + w_b \sum_l \tau^2\,\mathrm{KL}(q^l \,\|\, a^l) + w_l\,\tau^2\,\mathrm{KL}(q \,\|\, z)

    Args:
        student: Net and branches; both learn.
        peer: Has the same number of branches; net and branches learn, too, on images of its view.
        config: Temperature and weights; terms of weight zero are left out.
        label_smoothing: Share of a label spread over all labels.
        view: Gives the peer's images for a batch (normalized float32); the student's own if None.

    Raises:
        ValueError: If the nets have different numbers of branches.

    References:
        Yang et al., `Knowledge Distillation Using Hierarchical Self-Supervision Augmented Distribution
        <https://arxiv.org/abs/2109.03075>`_, 2021.
    """

    def __init__(
        self,
        student: BranchedNet,
        peer: BranchedNet,
        config: RotationsConfig,
        *,
        label_smoothing: float = 0.0,
        view: Callable[[Batch], Tensor] | None = None,
    ) -> None:
        _require_pairs(student, peer)
        self._student, self._peer, self._config = student, peer, config
        self._smoothing, self._view = label_smoothing, view
        self._guards = LogitsGuard("the student"), LogitsGuard()

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Register the forward hooks of both nets for the duration of a block."""
        with self._student.tapped(), self._peer.tapped():
            yield

    def __call__(self, batch: Batch) -> StepResult:
        """Return the loss of both nets, its terms (the peer's begin with ``peer_``), and the student's logits."""
        images = turn_images(batch.images)
        student = self._student(images)
        peer = self._peer(images if self._view is None else turn_images(self._view(batch)))
        for guard, one in zip(self._guards, (student, peer), strict=True):
            guard(one.logits)
        others = [(f"peer_{name}", weight, value) for name, weight, value in self._terms(peer, student, batch)]
        return _result([*self._terms(student, peer, batch), *others], upright(student.logits))

    def _terms(self, own: BranchedOutput, other: BranchedOutput, batch: Batch) -> list[Weighted]:
        config, smoothing = self._config, self._smoothing
        return [
            (
                "cross_entropy",
                config.task_weight,
                lambda: cross_entropy_loss(upright(own.logits), *_labels(batch), label_smoothing=smoothing),
            ),
            (
                "joint_labels",
                config.joint_weight,
                lambda: joint_label_loss(own.branches, *_labels(batch), label_smoothing=smoothing),
            ),
            *_soft_targets(own, other, config),
        ]


def _labels(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return labels, second labels and their shares; the latter are None if images are not mixed."""
    return (batch.labels, *second_labels(batch))


def _soft_targets(own: BranchedOutput, other: BranchedOutput, config: RotationsConfig) -> list[Weighted]:
    """Return the terms that one net learns from another, whose logits are constants."""
    heat = config.temperature
    return [
        (
            "branch_soft_target",
            config.branch_weight,
            lambda: branch_soft_target_loss(own.branches, other.branches, temperature=heat),
        ),
        ("soft_target", config.logit_weight, lambda: soft_target_loss(own.logits, other.logits, temperature=heat)),
    ]


def _result(terms: Sequence[Weighted], logits: Tensor) -> StepResult:
    values = {name: (weight, value()) for name, weight, value in terms if weight > 0}
    weighted = [value if weight == 1 else value * weight for weight, value in values.values()]
    loss = sum(weighted[1:], weighted[0])
    return StepResult(loss=loss, terms={name: value for name, (_, value) in values.items()}, logits=logits)


def _require_pairs(student: BranchedNet, teacher: BranchedNet) -> None:
    if len(student.branches) != len(teacher.branches):
        raise ValueError(
            f"branches of student and teacher pair up, but the student has {len(student.branches)} "
            f"({', '.join(student.paths)}) and the teacher {len(teacher.branches)} ({', '.join(teacher.paths)}); "
            f"give the same number of student_taps and teacher_taps"
        )
