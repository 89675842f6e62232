"""Distillation with your own nets and images, without a run folder or a config file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import GeneratorType
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from qkd.config import DEFAULT_TERMS, PhaseConfig, StudentConfig, StudentTrainConfig, TermConfig
from qkd.config.binding import bind_argument
from qkd.config.training import default_phases
from qkd.methods.phase_checks import phase_faults
from qkd.report.table import align
from qkd.terms import build_terms
from qkd.terms.modules import build_bank
from qkd.terms.step import DistillStep
from qkd.terms.taps import tap_paths_of
from qkd.terms.term_checks import use_faults
from qkd.training import Batch, Partner, build_optimizer, learning_rate
from qkd.training.optimizer import set_learning_rate
from quantizers import Student, act_quantizers, calibrate, freeze_batch_norm, quantizer_scales, settle
from quantizers.calibrate import as_batches
from quantizers.modes import evaluating

Loader: TypeAlias = Iterable[tuple[Tensor, Tensor]]
"""Batches of normalized images ``[batch, channels, height, width]`` and labels int64 ``[batch]``; it has a length."""

CALIBRATION_BATCHES: int = StudentConfig.model_fields["calibration_batches"].default


@dataclass(frozen=True)
class Distilled:
    """Record of a distillation, one line per epoch; printed as a table.

    Args:
        rows: One per epoch: ``epoch``, ``loss``, each term, ``accuracy`` on the validation batches (or None).
    """

    rows: tuple[Mapping[str, Any], ...]

    @property
    def accuracy(self) -> float | None:
        """Accuracy on the validation batches at the end, a fraction; None without any."""
        return self.rows[-1]["accuracy"] if self.rows else None

    def __str__(self) -> str:
        """Return the table."""
        head = list(self.rows[0]) if self.rows else []
        lines = [["" if row[key] is None else f"{row[key]:.4g}" for key in head] for row in self.rows]
        return align([head, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loaders: Loader | tuple[Loader, Loader] | tuple[Tensor, Tensor],
    *,
    terms: Sequence[TermConfig | Mapping[str, Any] | str] = DEFAULT_TERMS,
    train: StudentTrainConfig | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Distilled:
    """Train a student on a teacher's outputs, with the losses of configs; in place.

    A low-bit student (of ``quantizers.prepare``) that has no scales yet is calibrated first; its last tenth of epochs
    trains the deployed arithmetic, and its scales are settled at the end, so that its export is exact.

    Args:
        student: Float or low-bit; gives logits ``[batch, classes]``. In eval mode afterward.
        teacher: Likewise; only read, in eval mode, on the student's device. Its modes and flags are restored afterward.
        loaders: Batches ``(images, labels)`` for training, or a tuple of those for training and those for validation;
            the former must have a length. One pair of tensors is one batch.
        terms: Losses by the names of ``qkd ls losses``: ``"cross_entropy"``, or with the keys of a config's terms
            (``{"loss": "soft_target", "weight": 0.9, "options": {"temperature": 4}}``).
        train: Optimizer, rates and length, by the keys of ``student.train``; absent: its defaults. It computes in
            float32 and keeps the last weights: averages, the best ones and other arithmetic are for runs.
        seed: Of the modules that some terms learn.

    Returns:
        The results, one row per epoch.

    Raises:
        TypeError: If the training batches have no length, or are not pairs of images and labels, a term is no name, or
            validation batches can be read once only.
        ValueError: If terms or settings cannot be used, there are no batches (in some epoch), images are not finite, or
            student and teacher share parameters or buffers.
        RuntimeError: If the loss is not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> student, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)) for _ in range(2))
        >>> batches = [(torch.rand(8, 1, 4, 4), torch.arange(8) % 2) for _ in range(2)]
        >>> distilled = distill(student, teacher, batches, terms=["soft_target"], train={"epochs": 3})
        >>> [row["epoch"] for row in distilled.rows]
        [1, 2, 3]
    """
    given: Any = as_batches(loaders)
    batches, validation = given if _is_pair(given) else (given, None)
    settings = (
        train
        if isinstance(train, StudentTrainConfig)
        else bind_argument(StudentTrainConfig, dict(train or {}), "train")
    )
    _require_read(settings)
    if isinstance(terms, str):
        raise TypeError(f"terms: must be a list, got the text {terms!r}; write [{terms!r}]")
    chosen = [_term(one) for one in terms]
    phase = PhaseConfig(epochs=settings.epochs)
    if faults := [what for _, _, what in phase_faults(chosen, [phase])]:
        raise ValueError(f"terms: {'; '.join(faults)}")
    _require_apart(student, teacher)
    if isinstance(validation, _ONCE):
        raise TypeError(
            f"validation batches are read after every epoch, but a {type(validation).__name__} can be read once; give "
            f"a DataLoader or a list"
        )
    with _fixed(teacher):
        return _Distillation(student, teacher, batches, validation, settings, chosen, seed).run()


_ONCE = (GeneratorType, map, filter, zip, enumerate)  # of one reading; others may start again in `__iter__`
# Keys of a run's training that are not read here -> the values that a training here has
UNREAD: Mapping[str, tuple[Any, ...]] = {
    "precision": ("auto", "float32"), "memory_format": ("auto", "contiguous"), "ema_decay": (0.0,), "keep": ("last",),
}  # fmt: skip


def _require_read(settings: StudentTrainConfig) -> None:
    asked = [key for key, neutral in UNREAD.items() if getattr(settings, key) not in neutral]
    if asked:
        found = ", ".join(f"{key}={getattr(settings, key)!r}" for key in asked)
        raise ValueError(f"train: {found} has no effect here: leave it out, or use `qkd.run`, which reads it")


def _require_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Raise if training the student would change the teacher."""
    if student is teacher:
        raise ValueError("student and teacher are one object: give copy.deepcopy(teacher), or a student of `prepare`")
    ours = {_memory_of(one) for one in (*student.parameters(), *student.buffers()) if one.numel()}
    # a frozen head may be shared
    learning = [(name, one) for name, one in teacher.named_parameters() if one.requires_grad]
    theirs = [(name, one) for name, one in (*learning, *teacher.named_buffers()) if one.numel()]
    if shared := [name for name, one in theirs if _memory_of(one) in ours]:
        more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise ValueError(
            f"student and teacher share {shared[0]}{more}, so that training one would change the other: give the "
            f"student copies of these modules (copy.deepcopy)"
        )


def _memory_of(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


class _Distillation:
    """One distillation: its setup and its epochs."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, batches: Any, validation: Any, settings: StudentTrainConfig,
        terms: Sequence[TermConfig], seed: int,
    ) -> None:  # fmt: skip
        self.student, self.batches, self.validation, self.settings = student, batches, validation, settings
        self.steps = _length(batches)
        self.device = next(student.parameters()).device
        first = _first_images(batches).to(self.device)
        found = [fault for index, term in enumerate(terms) for fault in use_faults(term, f"terms[{index}]", len(first))]
        if found:
            raise ValueError("; ".join(found))
        if _has_no_scales(student):
            calibrate(student, [images.to(self.device) for images, _ in _some(batches)])
        bank = build_bank(student, teacher, terms, first[:2], seed=seed)
        partners = [Partner("terms", bank.modules)] if len(bank.modules) else []
        weighted = build_terms(terms, label_smoothing=settings.label_smoothing, bank=bank)
        self.step = DistillStep(student, teacher, weighted, tap_paths=tap_paths_of(student))
        self.optimizer = build_optimizer(student, settings, quantizer_scales(student), partners)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def run(self) -> Distilled:
        rows = [self._epoch(epoch) for epoch in range(self.settings.epochs)]
        if isinstance(self.student, Student):
            settle(self.student)
        self.student.eval()
        if rows and self.validation is not None:
            rows[-1]["accuracy"] = _accuracy(self.student, self.validation, self.device)  # with settled scales
        return Distilled(tuple(rows))

    def _epoch(self, epoch: int) -> dict[str, Any]:
        settings, phase, sums, images_seen = self.settings, self._phase(epoch), dict[str, float](), 0
        self.student.train()
        if isinstance(self.student, Student):
            freeze_batch_norm(self.student, phase.freeze_batch_norm)
        with self.step.tapped():
            for number, (images, labels) in enumerate(self.batches):
                rate = phase.rate_factor * learning_rate(settings, epoch * self.steps + number, self.steps)
                set_learning_rate(self.optimizer, rate)
                values = self._batch(images.to(self.device), labels.to(self.device), epoch, number)
                images_seen += len(images)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + value * len(images)
        if not images_seen:
            raise ValueError(
                f"epoch {epoch + 1} got no training batches, although their length is {self.steps}: they can be read "
                f"once only (by an earlier epoch or the calibration); give a DataLoader or a list"
            )
        means = {name: value / images_seen for name, value in sums.items()}
        scored = None if self.validation is None else _accuracy(self.student, self.validation, self.device)
        return {"epoch": epoch + 1, **means, "accuracy": scored}

    def _phase(self, epoch: int) -> PhaseConfig:
        """Return the phases of the training; for a low-bit student, the default phases of a run."""
        if not isinstance(self.student, Student):
            return PhaseConfig(epochs=self.settings.epochs)
        phases = default_phases(self.settings)
        return phases[-1] if epoch >= self.settings.epochs - phases[-1].epochs else phases[0]

    def _batch(self, images: Tensor, labels: Tensor, epoch: int, number: int) -> dict[str, float]:
        result = self.step(Batch(images, labels, images, epoch, number))
        if not bool(torch.isfinite(result.loss)):
            where = f"epoch {epoch + 1}, batch {number + 1}"
            if not bool(images.isfinite().all()):
                raise ValueError(f"the images of {where}, hold NaN or infinity: correct or leave them out")
            raise RuntimeError(f"the loss is {float(result.loss.detach())} in {where}: lower `lr`")
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()  # type: ignore[no-untyped-call]
        if self.settings.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad_norm)
        self.optimizer.step()
        parts = {"loss": result.loss, **result.terms}
        return {name: float(value.detach()) for name, value in parts.items()}


@contextmanager
def _fixed(teacher: nn.Module) -> Iterator[None]:
    """Freeze a teacher within a block (eval mode, no gradients), and restore it afterward."""
    flags = [(parameter, parameter.requires_grad) for parameter in teacher.parameters()]
    teacher.requires_grad_(False)
    try:
        with evaluating(teacher):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _term(one: TermConfig | Mapping[str, Any] | str) -> TermConfig:
    if isinstance(one, TermConfig):
        return one
    if not isinstance(one, str | Mapping):
        raise TypeError(f"terms: must be names of `qkd ls losses`, or mappings with such a loss, got {one!r}")
    return TermConfig(loss=one) if isinstance(one, str) else bind_argument(TermConfig, dict(one), "terms")


def _is_pair(loaders: Any) -> bool:
    """Return whether it is two loaders, not a tuple of two batches."""
    if not isinstance(loaders, tuple) or len(loaders) != 2:
        return False
    return not all(isinstance(one, tuple | list) and one and isinstance(one[0], Tensor) for one in loaders)


def _length(batches: Any) -> int:
    count = _length_of(batches)
    if count is None:
        raise TypeError(
            f"training batches must have a length, for the schedule of the learning rate, got a "
            f"{type(batches).__name__}; give a DataLoader or a list"
        )
    if count == 0:
        raise ValueError("there are no training batches")
    return count


def _first_images(batches: Any) -> Tensor:
    first = next(iter(batches))
    if isinstance(first, tuple | list) and len(first) == 2 and all(isinstance(one, Tensor) for one in first):
        return cast(Tensor, first[0])
    found = f"a tensor {list(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
    raise TypeError(f"training batches must be pairs (images, labels) of tensors, the first one is {found}")


def _has_no_scales(student: nn.Module) -> bool:
    if not isinstance(student, Student):
        return False
    return not all(quantizer.quant.is_calibrated for quantizer in act_quantizers(student).values())


def _some(batches: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    for _, batch in zip(range(CALIBRATION_BATCHES), batches, strict=False):
        yield batch


def _length_of(batches: Loader) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # without a length, or a DataLoader of an IterableDataset
        return None


def _accuracy(model: nn.Module, batches: Loader, device: torch.device) -> float | None:
    right = images_seen = 0
    with evaluating(model), torch.no_grad():
        for images, labels in batches:
            if not bool(images.isfinite().all()):
                raise ValueError("validation images hold NaN or infinity: correct or leave them out")
            right += int((model(images.to(device)).argmax(1) == labels.to(device)).sum())
            images_seen += len(labels)
    if not images_seen and _length_of(batches) != 0:
        raise ValueError("there were no validation batches, or they can be read once only; give a DataLoader or a list")
    return right / images_seen if images_seen else None
