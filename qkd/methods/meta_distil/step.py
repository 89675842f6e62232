"""The step of MetaDistil: simulate a step of the student, update the teacher on a quiz, then take the real step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from qkd.losses.given import teacher_in_graph
from qkd.methods.meta_distil.gradient import MetaGradient, Order, meta_gradient
from qkd.terms.step import DistillStep, second_labels
from qkd.terms.weighting import Outputs, WeightedTerms
from qkd.training.finite import TrainingError
from qkd.training.job import Batch, StepResult


@dataclass(frozen=True)
class MetaRates:
    """Learning rates of one step.

    Args:
        inner_lr: Learning rate of the student's assumed step.
        teacher_lr: Learning rate of the teacher; None if it is not taught (yet), so that the step is a plain one.
    """

    inner_lr: float
    teacher_lr: float | None


class MetaStep(DistillStep):
    """A training step for a student whose teacher learns, too.

    1. *Assume*: compute the student's weights after one step of gradient descent on this batch. The student
       itself, its batch-norm statistics and the random numbers of the step do not change.
    2. *Teach*: compute the cross-entropy of that student on a batch of the quiz. Its gradient with respect to the
       teacher's weights updates the teacher, with its own optimizer.
    3. *Pilot*: take an ordinary distillation step on the same batch, with the updated teacher.

    Deviation: the teacher is in eval mode throughout, so that its batch-norm statistics do not change; the released
    code has it in train mode while it is taught. The assumed student is in the same mode
    as the student. Reduced precision is off except in the pilot step.

    Args:
        student: Returns logits ``[batch, classes]``.
        teacher: Likewise; it is updated.
        terms: The loss; at least one term reads the teacher.
        quiz: Returns normalized images and labels of the quiz for an epoch and a step.
        rates: Returns the learning rates for a batch.
        optimizer: Optimizer of the teacher's parameters; its learning rate is set at every step.
        order: How the quiz's gradient is computed; see :func:`~qkd.methods.meta_distil.gradient.meta_gradient`.
        scales: Returns the step sizes of quantizers among the student's weights; called at the first step.
        scale_lr_factor: Factor on ``inner_lr`` for those.
        view: Returns the teacher's images for a batch (normalized float32); the student's own if None.
        tap_paths: Float module path -> path within the student.
        first_epoch: Epoch of the training in which the phase begins.

    Raises:
        ValueError: If no term reads the teacher, or a tap does not name a module.

    References:
        Zhou, Xu, McAuley, `BERT Learns to Teach: Knowledge Distillation with Meta Learning
        <https://arxiv.org/abs/2106.04570>`_, 2022, algorithm 1.

    Note:
        As published, the teacher's rate is 0 until a given epoch while its momentum accumulates; here nothing is
        computed until then, and the momentum starts at 0.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: WeightedTerms,
        quiz: Callable[[int, int], tuple[Tensor, Tensor]],
        rates: Callable[[Batch], MetaRates],
        optimizer: Optimizer,
        *,
        order: Order = "second",
        scales: Callable[[], Iterable[nn.Parameter]] = tuple,
        scale_lr_factor: float = 1.0,
        view: Callable[[Batch], Tensor] | None = None,
        tap_paths: Mapping[str, str] | None = None,
        first_epoch: int = 0,
    ) -> None:
        super().__init__(student, teacher, terms, view=view, tap_paths=tap_paths, first_epoch=first_epoch)
        if not (terms.needs_teacher or terms.needs_class_weights):
            raise ValueError("no loss term reads the teacher, so a quiz cannot teach it; add one, e.g. soft_target")
        self._quiz, self._rates, self._optimizer, self._order = quiz, rates, optimizer, order
        self._scales, self._scale_lr_factor = scales, scale_lr_factor
        self._lr_factors: dict[str, float] | None = None

    def __call__(self, batch: Batch) -> StepResult:
        """Teach the teacher, then return the plain step's result; ``quiz_loss`` is among its facts."""
        rates = self._rates(batch)
        if rates.teacher_lr is None:
            return super().__call__(batch)
        found = self.gradient(batch, rates.inner_lr)
        self._require_finite(found, batch)
        self._move(found.gradients, rates.teacher_lr)
        result = super().__call__(batch)
        return dataclasses.replace(result, facts={**result.facts, "quiz_loss": found.quiz_loss})

    def gradient(self, batch: Batch, inner_lr: float) -> MetaGradient:
        """Return the quiz loss after an assumed step, and its gradient for the teacher's parameters; change nothing.

        Args:
            batch: The batch of the assumed step.
            inner_lr: Learning rate of that step.
        """
        images, labels = self._quiz(batch.epoch, batch.step)
        teacher = {name: weight.detach().requires_grad_() for name, weight in self._teacher.named_parameters()}
        weights = {name: weight for name, weight in self._student.named_parameters() if weight.requires_grad}

        def quiz_loss(weights: Mapping[str, Tensor]) -> Tensor:
            return functional.cross_entropy(self._assumed(weights, images)[0], labels)

        with torch.enable_grad(), torch.autocast(images.device.type, enabled=False), teacher_in_graph():
            taught = self._teacher_half(batch, teacher)

            def student_loss(weights: Mapping[str, Tensor]) -> Tensor:
                logits, features = self._assumed(weights, batch.images)
                outputs = dataclasses.replace(taught, student_logits=logits, student_features=features)
                return self._terms.weigh(outputs, epoch=batch.epoch - self._first_epoch).total

            return meta_gradient(
                student_loss, quiz_loss, weights, tuple(teacher.values()),
                inner_lr=inner_lr, order=self._order, lr_factors=self._factors(),
            )  # fmt: skip

    def _factors(self) -> dict[str, float]:
        """Return weight -> factor on its learning rate, if not 1."""
        if self._lr_factors is None:
            scales = set() if self._scale_lr_factor == 1 else {id(scale) for scale in self._scales()}
            named = self._student.named_parameters()
            self._lr_factors = {name: self._scale_lr_factor for name, weight in named if id(weight) in scales}
        return self._lr_factors

    def _assumed(self, weights: Mapping[str, Tensor], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and features of the student with other weights; its own and its statistics do not change."""
        buffers = {name: buffer.clone() for name, buffer in self._student.named_buffers()}
        with _kept_random_state(images.device):  # so that the pilot has the same dropout as the assumed step
            logits = functional_call(self._student, {**weights, **buffers}, (images,))
        return logits, self._student_taps.take()

    def _teacher_half(self, batch: Batch, teacher: Mapping[str, Tensor]) -> Outputs:
        """Return the teacher's half of the outputs, with its graph, without the student's."""
        labels, share = second_labels(batch)
        outputs = Outputs(batch.images, batch.labels, other_labels=labels, other_share=share)
        if self._class_weights is not None:
            outputs = dataclasses.replace(outputs, class_weights=teacher[self._class_weights.name(batch.images)])
        if not self._terms.needs_teacher:
            return outputs
        images = batch.images if self._view is None else self._view(batch)
        with _kept_random_state(images.device):
            logits = functional_call(self._teacher, dict(teacher), (images,))
        return dataclasses.replace(outputs, teacher_logits=logits, teacher_features=self._teacher_taps.take())

    def _require_finite(self, found: MetaGradient, batch: Batch) -> None:
        norm = get_total_norm([*found.gradients, found.quiz_loss])
        if not bool(torch.isfinite(norm)):
            raise TrainingError(
                f"the quiz gradient with respect to the teacher is not finite at epoch {batch.epoch + 1}, "
                f"step {batch.step + 1}: quiz loss {float(found.quiz_loss):.6g}, gradient norm {float(norm):.6g}; "
                f"lower meta.inner_lr or meta.teacher_lr, and give the run another name",
                epoch=batch.epoch + 1,
                step=batch.step + 1,
                term="quiz",
            )

    def _move(self, gradients: tuple[Tensor, ...], lr: float) -> None:
        """Update the teacher; its parameters neither keep a gradient nor require one."""
        parameters = tuple(self._teacher.parameters())
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


@contextmanager
def _kept_random_state(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
