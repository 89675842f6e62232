"""Co-studying: student and teacher learn on the same batch, from their own terms and from each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from qkd.terms.last_layer import LogitsWeights
from qkd.terms.rescaling import step_facts
from qkd.terms.step import second_labels
from qkd.terms.taps import Taps
from qkd.terms.weighting import Outputs, WeightedTerms
from qkd.training.job import Batch, StepResult
from qkd.training.supervised import LogitsGuard


class CoStudyStep:
    r"""A training step for student and teacher at once.

    .. math:: L = L_s(z_s, \mathrm{sg}(z_t)) + L_t(z_t, \mathrm{sg}(z_s))

    with :math:`\mathrm{sg}` the stopped gradient: no term updates the net that it learns from. Both nets are in train
    mode. In the teacher's terms, the teacher plays the student's part: its logits are ``student_logits`` there, and
    taps are pairs ``[teacher module, student module]``.

    Args:
        student: Gives logits ``[batch, classes]``.
        teacher: The same; its parameters require gradients.
        terms: The student's.
        teacher_terms: The teacher's.
        view: Gives the teacher's images for a batch; the student's own if None.
        tap_paths: Float module path -> path within the student.
        first_epoch: Epoch of the training in which the phase begins.

    Raises:
        ValueError: If a tap does not name a module, or a term reads a last layer that is not linear.

    References:
        Kim et al., `QKD: Quantization-aware Knowledge Distillation <https://arxiv.org/abs/1911.12491>`_, 2019, its
        co-studying phase. Mishra, Marr, `Apprentice <https://arxiv.org/abs/1711.05852>`_, 2018: scheme A is this step
        from untrained weights with a teacher that learns from the labels alone.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: WeightedTerms,
        teacher_terms: WeightedTerms,
        *,
        view: Callable[[Batch], Tensor] | None = None,
        tap_paths: Mapping[str, str] | None = None,
        first_epoch: int = 0,
    ) -> None:
        self._student, self._teacher, self._view, self._first_epoch = student, teacher, view, first_epoch
        self._terms, self._teacher_terms = terms, teacher_terms
        student_taps = (*terms.student_taps, *teacher_terms.teacher_taps)
        teacher_taps = (*terms.teacher_taps, *teacher_terms.student_taps)
        self._student_taps = Taps(student, dict.fromkeys(student_taps), translate=tap_paths, role="student")
        self._teacher_taps = Taps(teacher, dict.fromkeys(teacher_taps), role="teacher")
        if teacher_terms.needs_class_weights:
            raise ValueError("teacher_terms: class_relation reads a full-precision last layer; the student has none")

        self._class_weights = LogitsWeights(teacher) if terms.needs_class_weights else None
        self._guard, self._student_guard = LogitsGuard(), LogitsGuard("the student")

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Register the forward hooks for the duration of a block. The step needs them if a term reads features."""
        with self._student_taps, self._teacher_taps:
            yield

    def __call__(self, batch: Batch) -> StepResult:
        """Return loss, terms (the teacher's prefixed with ``teacher_``) and the student's logits for a batch."""
        weights = None if self._class_weights is None else self._class_weights(batch.images)  # may run the teacher
        student_logits = self._student(batch.images)
        self._student_guard(student_logits)
        student_features = self._student_taps.take()
        teacher_logits = self._teacher(batch.images if self._view is None else self._view(batch))
        self._guard(teacher_logits)
        teacher_features = self._teacher_taps.take()
        second, epoch = second_labels(batch), batch.epoch - self._first_epoch
        learns = Outputs(
            student_logits, batch.labels, teacher_logits.detach(), student_features, _still(teacher_features), weights,
            *second,
        )  # fmt: skip
        own = self._terms.weigh(learns, epoch=epoch)
        teaches = Outputs(
            teacher_logits, batch.labels, student_logits.detach(), teacher_features, _still(student_features), None,
            *second,
        )  # fmt: skip
        other = self._teacher_terms.weigh(teaches, epoch=epoch)
        parts = {**own.parts, **{f"teacher_{name}": value for name, value in other.parts.items()}}
        facts = step_facts(self._terms.configs, learns, epoch=epoch)
        return StepResult(own.total + other.total, parts, student_logits, facts=facts)


def _still(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {path: feature.detach() for path, feature in features.items()}
