"""The phases of a distillation: what a config says of each, as steps that are ready to train."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from qkd.config import MetaConfig, PhaseConfig, RunConfig, TermConfig
from qkd.data import Splits
from qkd.methods.co_study.step import CoStudyStep
from qkd.methods.ensemble.average import EnsembleTeacher
from qkd.methods.meta_distil.quiz import Quiz
from qkd.methods.meta_distil.schedule import MetaSchedule
from qkd.methods.meta_distil.step import MetaStep
from qkd.methods.peers.nets import Peer, adapters, learners
from qkd.methods.peers.step import StudentEnsembleStep
from qkd.methods.rotations.branches import Rotations, rotations
from qkd.terms import WeightedTerms, build_terms, phase_faults
from qkd.terms.combine import clipped_backward
from qkd.terms.modules import ModuleBank, build_bank
from qkd.terms.step import DistillStep
from qkd.terms.taps import tap_paths_of
from qkd.training import Batch, Partner, Phase, StepResult
from qkd.training.job import Backward, plain_backward
from quantizers import Student, freeze_batch_norm, quantizer_scales


@dataclass(frozen=True)
class Distillation:
    """What a student's training is made of.

    Args:
        phases: Ready to train.
        partners: Nets that learn beside the student: modules of loss terms, auxiliary branches, a teacher that studies
            along, peers.
        low_bit: Those of them that need a calibration at the start, as the student does.
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
    peers: Sequence[Peer] = (),
    branches: nn.ModuleList | None = None,
) -> Distillation:
    """Return the phases of a distillation and the nets that learn beside the student.

    Args:
        config: Its ``student`` section has the loss terms.
        phases: Names, lengths and what is special about each.
        student: The net that is trained, low-bit or float.
        teacher: Its parameters require a gradient afterwards only if a phase trains it.
        view: Gives the teacher's images; None where it sees the student's.
        net: The student's float net, for the shapes of its features.
        splits: The images: their shape, how many steps an epoch has, and the quiz.
        peers: Of the student, where ``student.peers`` names any.
        branches: The teacher's trained ones, for offline rotations.

    Raises:
        ValueError: If a term or a tap cannot be used, a phase cannot be trained as it says, or branches are needed and
            missing.
    """
    faults = [f"phases[{index}].{key}: {what}" for index, key, what in _faults(config, phases)]
    if faults:
        raise ValueError("the student's phases cannot be trained:\n" + "\n".join(f"  {fault}" for fault in faults))
    return _Builder(config, phases, student, teacher, view, net, splits, peers, branches).build()


def terms_of(config: RunConfig, phase: PhaseConfig) -> tuple[TermConfig, ...]:
    """Return the student's terms in a phase: its own, or the student's; none where peers or rotations bring theirs."""
    if phase.terms is not None:
        return phase.terms
    return config.student.terms if has_students_terms(config, phase) else ()


def has_students_terms(config: RunConfig, phase: PhaseConfig) -> bool:
    """Return whether a phase has the student's own terms: none of its own, and no peers or rotations with theirs."""
    return phase.terms is None and not has_peers(config, phase) and not is_turned(config, phase)


def has_peers(config: RunConfig, phase: PhaseConfig) -> bool:
    """Return whether the student's peers learn along in a phase."""
    return config.student.peers is not None and phase.peers


def is_turned(config: RunConfig, phase: PhaseConfig) -> bool:
    """Return whether a phase trains on turned images: all do that have no terms of their own, if any does."""
    return config.student.rotations is not None and phase.terms is None


def _faults(config: RunConfig, phases: Sequence[PhaseConfig]) -> Iterator[tuple[int, str, str]]:
    return phase_faults(config.student.terms, phases, has_peers=config.student.peers is not None)


class _Builder:
    """Builds phases one after the other; they share nets, module banks and partners."""

    def __init__(
        self,
        config: RunConfig,
        phases: Sequence[PhaseConfig],
        student: nn.Module,
        teacher: nn.Module,
        view: Callable[[Batch], Tensor] | None,
        net: nn.Module,
        splits: Splits,
        peers: Sequence[Peer],
        branches: nn.ModuleList | None,
    ) -> None:
        self.config, self.configs, self.student, self.teacher, self.view = config, phases, student, teacher, view
        self.peers, section = tuple(peers), config.student.peers
        taps = () if section is None else section.taps
        device = next(student.parameters()).device
        self.learners = learners(peers, student, taps)
        self.adapters = adapters(peers, net, taps, splits, seed=config.seed, device=device) if peers else None
        self.splits = splits
        self.metas = [phase.meta for phase in phases if phase.meta is not None]
        self.studies = [phase for phase in phases if phase.teacher_terms is not None]
        starts = accumulate((phase.epochs for phase in phases), initial=0)
        clipped = (start for start, phase in zip(starts, phases, strict=False) if phase.combine == "clipped")
        self.clipped_from = next(clipped, 0)  # where clipping begins: its epochs are counted through later phases
        starts = accumulate((phase.epochs for phase in phases), initial=0)
        taught = (start for start, phase in zip(starts, phases, strict=False) if phase.meta is not None)
        self.taught_from = next(taught, 0)  # where MetaDistil begins: its teacher's rate falls through later phases
        turning = config.student.rotations
        teacher.requires_grad_(bool(self.studies) or (turning is not None and turning.mode == "online"))
        images = torch.zeros(2, splits.channels, splits.image_size, splits.image_size, device=device)
        own = [term for phase in phases for term in terms_of(config, phase)]
        others = [term for phase in self.studies for term in phase.teacher_terms or ()]
        net = net.to(device)
        self.bank = build_bank(net, teacher, own, images, seed=config.seed)
        self.teacher_bank = build_bank(teacher, net, others, images, seed=config.seed)
        self.turned: Rotations | None = None
        if turning is not None:
            self.turned = rotations(config, cast(Student, student), teacher, branches, view, net=net, splits=splits)
        self.optimizer = _teacher_optimizer(teacher, self.metas[0]) if self.metas else None

    def build(self) -> Distillation:
        starts = list(accumulate((phase.epochs for phase in self.configs), initial=0))[:-1]
        has_shared = [has_students_terms(self.config, phase) for phase in self.configs]
        shared = next((start for start, has in zip(starts, has_shared, strict=True) if has), 0)
        phases = [
            # the student's own terms go on decaying through all phases that have them: settling is no new beginning
            self._phase(phase, shared if has else start)
            for start, phase, has in zip(starts, self.configs, has_shared, strict=True)
        ]
        low_bit = tuple(peer.model for peer in self.peers if isinstance(peer.model, Student))
        return Distillation(tuple(phases), self._partners(), low_bit)

    def _partners(self) -> tuple[Partner, ...]:
        banks = {"terms": self.bank, "teacher_terms": self.teacher_bank}
        partners = [Partner(name, bank.modules) for name, bank in banks.items() if len(bank.modules)]
        if self.studies:
            partners.append(Partner("teacher", self.teacher, self.studies[0].teacher_lr_factor))  # the same in all
        if self.optimizer is not None:
            partners.append(Partner("teacher", self.teacher, optimizer=self.optimizer))
        return (*partners, *self._peer_partners(), *(self.turned.partners if self.turned is not None else ()))

    def _peer_partners(self) -> list[Partner]:
        section = self.config.student.peers
        if section is None or self.adapters is None:
            return []
        maps = [Partner("peer_adapters", self.adapters, section.lr_factor)] if len(self.adapters.maps) else []
        return [*(peer.partner(section.lr_factor) for peer in self.peers), *maps]

    def _phase(self, phase: PhaseConfig, first_epoch: int) -> Phase:
        turned = self.turned if is_turned(self.config, phase) else None
        step = self._step(phase, first_epoch) if turned is None else turned.step

        def enter() -> None:
            self.teacher.train(phase.teacher_terms is not None)
            for learner in self.learners:
                learner.net.train()
                freeze_batch_norm(learner.net, phase.freeze_batch_norm)
            if phase.trains == "modules":
                self.student.eval()
            if turned is not None:
                turned.enter()

        # the deployed arithmetic is float32: reduced precision would train something else
        allows_autocast = not phase.freeze_batch_norm
        return Phase(
            phase.name, phase.epochs, step, enter, step.tapped, allows_autocast, phase.rate_factor,
            self._backward(phase),
        )  # fmt: skip

    def _backward(self, phase: PhaseConfig) -> Backward:
        if phase.combine == "sum":
            return plain_backward

        def backward(batch: Batch, result: StepResult, scale: Callable[[Tensor], Tensor]) -> None:
            if result.task is None or result.knowledge is None:
                raise ValueError("clipped gradients need terms with and without the teacher")
            epoch = batch.epoch - self.clipped_from
            clipped_backward(result.task, result.knowledge, scale, self.student.parameters(), epoch=epoch)

        return backward

    def _step(self, phase: PhaseConfig, first_epoch: int) -> DistillStep | CoStudyStep | StudentEnsembleStep | MetaStep:
        chosen = terms_of(self.config, phase)
        if phase.meta is not None:
            return self._meta_step(phase, phase.meta, self._terms(chosen, self.bank), first_epoch)
        if has_peers(self.config, phase):
            return self._ensemble_step(self._distill_step(chosen, first_epoch) if chosen else None)
        if phase.trains == "modules" and not self._terms(chosen, self.bank).has_modules:
            raise ValueError(
                f"phase {phase.name}: trains `modules`, but at these taps no term needs one; remove the phase"
            )
        if phase.teacher_terms is None:
            return self._distill_step(chosen, first_epoch, student_learns=phase.trains == "student")
        nets, paths = (self.student, self.teacher), tap_paths_of(self.student)
        terms, taught = self._terms(chosen, self.bank), self._terms(phase.teacher_terms, self.teacher_bank)
        return CoStudyStep(*nets, terms, taught, view=self.view, tap_paths=paths, first_epoch=first_epoch)

    def _distill_step(
        self, chosen: Sequence[TermConfig], first_epoch: int, *, student_learns: bool = True
    ) -> DistillStep:
        terms = self._terms(chosen, self.bank)
        if isinstance(self.teacher, EnsembleTeacher) and (terms.teacher_taps or terms.needs_class_weights):
            raise ValueError(
                f"the teacher is an ensemble of {len(self.teacher.members)} nets: it has neither features nor a last "
                f"layer of its own; use losses on logits, or teacher.members: 1"
            )
        paths = tap_paths_of(self.student)
        return DistillStep(
            self.student, self.teacher, terms, view=self.view, tap_paths=paths, first_epoch=first_epoch,
            student_learns=student_learns,
        )  # fmt: skip

    def _ensemble_step(self, own: DistillStep | None) -> StudentEnsembleStep:
        section = self.config.student.peers
        if section is None or self.adapters is None:
            raise ValueError("student.peers: the phase has peers, but there are none")
        return StudentEnsembleStep(
            self.learners,
            self.adapters,
            temperature=section.temperature,
            label_weight=section.label_weight,
            feature_weight=section.feature_weight,
            ensemble_weight=section.ensemble_weight,
            label_smoothing=self.config.student.train.label_smoothing,
            own=own,
            own_hold=nullcontext if own is None else own.tapped,
        )

    def _meta_step(self, phase: PhaseConfig, meta: MetaConfig, terms: WeightedTerms, first_epoch: int) -> MetaStep:
        splits, train = self.splits, self.config.student.train
        if splits.quiz is None or self.optimizer is None:
            raise ValueError(f"phase {phase.name}: meta needs a quiz, but the images have none; see qkd.data.take_quiz")
        size = min(self.config.data.batch_size, len(splits.train))
        device = next(self.teacher.parameters()).device
        return MetaStep(
            cast(Student, self.student),
            self.teacher,
            terms,
            Quiz(splits.quiz, batch_size=size, mean=splits.mean, std=splits.std, seed=self.config.seed, device=device),
            MetaSchedule(
                train,
                meta,
                steps_per_epoch=len(splits.train) // size,
                lr_factor=phase.rate_factor,
                first_epoch=self.taught_from,
            ),
            self.optimizer,
            order=meta.order,
            scales=lambda: quantizer_scales(cast(Student, self.student)),
            scale_lr_factor=train.scale_lr_factor,
            view=self.view,
            tap_paths=tap_paths_of(self.student),
            first_epoch=first_epoch,
        )

    def _terms(self, terms: Sequence[TermConfig], bank: ModuleBank) -> WeightedTerms:
        return build_terms(terms, label_smoothing=self.config.student.train.label_smoothing, bank=bank)


def _teacher_optimizer(teacher: nn.Module, meta: MetaConfig) -> torch.optim.Optimizer:
    momentum, decay = meta.teacher_momentum, meta.teacher_weight_decay
    return torch.optim.SGD(teacher.parameters(), lr=0.0, momentum=momentum, weight_decay=decay)  # each step sets lr
