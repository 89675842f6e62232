"""The distillation step: student and fixed teacher on one batch, features tapped, terms summed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from qkd.terms.last_layer import LogitsWeights
from qkd.terms.rescaling import step_facts
from qkd.terms.taps import Taps, tap_paths_of, why_no_features
from qkd.terms.teacher_memory import TeacherMemory
from qkd.terms.weighting import Outputs, WeightedTerms
from qkd.training.arithmetic.folded import FoldedNet
from qkd.training.job import Batch, StepResult
from qkd.training.supervised import LogitsGuard


class DistillStep:
    """A training step for the student.

    The teacher is read-only: it must be in eval mode and none of its parameters may require a gradient. Its forward
    pass builds no graph, and is skipped if no term needs it.

    Args:
        student: Returns logits ``[batch, classes]``.
        teacher: Likewise, fixed.
        terms: The loss.
        view: Returns the teacher's images for a batch (normalized float32). If omitted: the student's images.
        tap_paths: Float module path -> path within the student, for feature losses. If omitted: the same paths.
        first_epoch: Epoch of the training in which the phase begins; terms with a decay count from it.
        student_learns: If False, the student's forward pass builds no graph, and only modules of terms get a gradient.
        memory: Returns the teacher's logits if it sees each image unchanged; unused if features are read as well.

    Raises:
        ValueError: If a tap does not name a module, or a term reads the teacher's last layer and that is not linear;
            at the first batch, if the teacher returns probabilities.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: WeightedTerms,
        *,
        view: Callable[[Batch], Tensor] | None = None,
        tap_paths: Mapping[str, str] | None = None,
        first_epoch: int = 0,
        student_learns: bool = True,
        memory: TeacherMemory | None = None,
    ) -> None:
        if (why := why_no_features(teacher)) and (terms.teacher_taps or terms.needs_class_weights):
            raise ValueError(why)
        self._student, self._teacher, self._terms, self._view = student, teacher, terms, view
        self._first_epoch, self._student_learns = first_epoch, student_learns
        self._fast_teacher = FoldedNet(teacher)
        self._guard, self._student_guard = LogitsGuard(), LogitsGuard("the student")
        self._memory = None if terms.teacher_taps else memory
        self._student_taps = Taps(student, terms.student_taps, translate=tap_paths, role="student")
        self._teacher_taps = Taps(teacher, terms.teacher_taps, translate=tap_paths_of(teacher), role="teacher")
        self._class_weights = LogitsWeights(teacher) if terms.needs_class_weights else None

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Keep the forward hooks within a block; the step needs them if a term reads features."""
        with self._student_taps, self._teacher_taps:
            yield

    def __call__(self, batch: Batch) -> StepResult:
        """Return loss, terms and the student's logits for a batch."""
        weights = None if self._class_weights is None else self._class_weights(batch.images)  # may run the teacher
        with nullcontext() if self._student_learns else torch.no_grad():
            student_logits = self._student(batch.images)
        if self._student_learns:  # otherwise it is in eval mode, in which a low-bit student ends in its softmax
            self._student_guard(student_logits)
        student_features = self._student_taps.take()
        teacher_logits, teacher_features = None, {}
        if self._terms.needs_teacher:
            teacher_logits = self._teacher_logits(batch)
            self._guard(teacher_logits)
            teacher_features = self._teacher_taps.take()
        outputs = Outputs(
            student_logits, batch.labels, teacher_logits, student_features, teacher_features, weights,
            *second_labels(batch),
        )  # fmt: skip
        epoch = batch.epoch - self._first_epoch
        found = self._terms.weigh(outputs, epoch=epoch)
        facts = {**step_facts(self._terms.configs, outputs, epoch=epoch), **batch.facts}
        return StepResult(found.total, found.parts, student_logits, found.task, found.knowledge, facts)

    @torch.no_grad()
    def _teacher_logits(self, batch: Batch) -> Tensor:
        known = None if self._memory is None else self._memory.logits(self._teacher, batch)
        if known is not None:
            return known
        logits: Tensor = self._fast_teacher(batch.images if self._view is None else self._view(batch))
        return logits


def second_labels(batch: Batch) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Return the second labels of a batch and their shares; None if images are not mixed."""
    return (None, None) if batch.mixed is None else (batch.mixed.labels, batch.mixed.share)
