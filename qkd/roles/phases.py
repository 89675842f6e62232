"""The phases of a distillation: a config's settings for each, as steps that are ready to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torch import Tensor, nn

from qkd.config import PhaseConfig, RunConfig, TermConfig
from qkd.data import Splits
from qkd.methods.method import Lesson, Method
from qkd.methods.phase_checks import student_faults
from qkd.methods.table import methods_of
from qkd.roles.nets import blank_images
from qkd.run.folder import RunFolder
from qkd.terms.modules import build_bank
from qkd.training import Batch, Partner, Phase
from quantizers import Student, freeze_batch_norm


@dataclass(frozen=True)
class Distillation:
    """The parts of a student's training.

    Args:
        phases: Ready to train.
        partners: Nets that learn along with the student: modules of loss terms, and what methods add.
        low_bit: Those of them that need calibration at the start, like the student.
    """

    phases: tuple[Phase, ...]
    partners: tuple[Partner, ...]
    low_bit: tuple[Student, ...] = ()


def distillation(
    config: RunConfig,
    phases: Sequence[PhaseConfig],
    student: nn.Module,
    teacher: nn.Module,
    view: Callable[[Batch], Tensor] | None,
    *,
    net: nn.Module,
    splits: Splits,
    methods: Sequence[Method] | None = None,
    run: RunFolder | None = None,
    weights: Path | None = None,
) -> Distillation:
    """Return the phases of a distillation and the nets that learn along with the student.

    Args:
        config: Its ``student`` section has the loss terms.
        phases: Name, length and special settings of each.
        student: The net that is trained, low-bit or float.
        teacher: Its parameters require no gradient afterward unless a phase trains it; then they are left unchanged.
        view: Returns the teacher's images; None if it sees the student's.
        net: The student's float net, for the shapes of its features.
        splits: The images, for their shape and the number of steps per epoch.
        methods: The methods that add steps and nets. If omitted: those that the config requests.
        run: The run folder, for what methods have trained before; None outside a run.
        weights: What the student starts from; None if its weights are random.

    Raises:
        ValueError: If a term or a tap cannot be used, a phase cannot be trained as configured, a method trains no
            phase because another one takes them all, a teacher is to be taught whose parameters are all frozen, or
            something that a method has to train first is missing.
    """
    if faults := student_faults(config.student, phases):
        raise ValueError("the student's phases cannot be trained:\n" + "\n".join(f"  {fault}" for fault in faults))
    methods = methods_of(config) if methods is None else methods
    _require_none_shadowed(methods, phases)
    device = next(student.parameters()).device
    teaching = [type(method).__name__ for method in methods if method.trains_teacher]
    if not teaching:  # otherwise, its frozen parameters stay frozen
        teacher.requires_grad_(False)
    elif not any(parameter.requires_grad for parameter in teacher.parameters()):
        raise ValueError(f"{teaching[0]} teaches the teacher, but all of its parameters are frozen")
    images = blank_images(splits, device)
    terms = [_terms_of(config, phase, _taker(methods, phase)) for phase in phases]
    net = net.to(device)
    bank = build_bank(net, teacher, [term for chosen in terms for term in chosen], images, seed=config.seed)
    lesson = Lesson(config, phases, student, teacher, view, net, splits, run, weights, bank)
    for method in methods:
        method.prepare(lesson)
    firsts = _first_epochs(methods, phases)
    made = [_phase(lesson, methods, *each) for each in zip(phases, terms, firsts, strict=True)]
    partners = (Partner("terms", bank.modules),) if len(bank.modules) else ()
    beside = (partner for method in methods for partner in method.partners)
    return Distillation(tuple(made), (*partners, *beside), tuple(one for method in methods for one in method.low_bit))


def _taker(methods: Sequence[Method], phase: PhaseConfig) -> Method:
    return next(method for method in methods if method.takes(phase))  # plain distillation takes any


def _require_none_shadowed(methods: Sequence[Method], phases: Sequence[PhaseConfig]) -> None:
    """Raise if a requested method would train phases, but another one takes all of them first: it would do nothing.

    Raises:
        ValueError: If so.
    """
    takers = [_taker(methods, phase) for phase in phases]
    for method in methods[:-1]:  # the last one is plain distillation, for what is left
        wanted = [taker for taker, phase in zip(takers, phases, strict=True) if method.takes(phase)]
        if wanted and method not in wanted:
            raise ValueError(
                f"{type(wanted[0]).__name__} takes every phase that {type(method).__name__} would train, which then "
                f"does nothing: request one of the two, or give them phases of their own"
            )


def _terms_of(config: RunConfig, phase: PhaseConfig, taker: Method) -> tuple[TermConfig, ...]:
    """Return the terms of a phase: its own, or the student's; empty if a method provides the loss."""
    if phase.terms is not None:
        return phase.terms
    return () if taker.brings_loss else config.student.terms


def _first_epochs(methods: Sequence[Method], phases: Sequence[PhaseConfig]) -> list[int]:
    """Return the epoch at which the terms of each phase begin to decay.

    The student's own terms continue through all phases that use them: settling does not start over.
    """
    starts = list(accumulate((phase.epochs for phase in phases), initial=0))[:-1]
    has_shared = [phase.terms is None and not _taker(methods, phase).brings_loss for phase in phases]
    shared = next((start for start, has in zip(starts, has_shared, strict=True) if has), 0)
    return [shared if has else start for start, has in zip(starts, has_shared, strict=True)]


def _phase(
    lesson: Lesson, methods: Sequence[Method], phase: PhaseConfig, terms: Sequence[TermConfig], first_epoch: int
) -> Phase:
    taker = _taker(methods, phase)
    step = taker.step(lesson, phase, terms, first_epoch)
    is_frozen = phase.freeze_batch_norm or lesson.config.student.bn == "frozen_teacher"

    def enter() -> None:
        lesson.teacher.eval()
        lesson.student.train()
        if isinstance(lesson.student, Student):
            freeze_batch_norm(lesson.student, is_frozen)
        for method in methods:
            method.enter(lesson, phase)

    # the deployed arithmetic is float32, so reduced precision would train something else
    allows_autocast = not is_frozen
    return Phase(
        phase.name, phase.epochs, step, enter, step.tapped, allows_autocast, phase.rate_factor,
        taker.backward(lesson, phase), settles=is_frozen,
    )  # fmt: skip
