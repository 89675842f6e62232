"""The phases of a distillation: what a config says of each, as steps that are ready to train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qkd.config import PhaseConfig, RunConfig, TermConfig
from qkd.data import Splits
from qkd.distill import WeightedTerms, build_terms
from qkd.distill.methods import CoStudyStep
from qkd.distill.modules import ModuleBank, build_bank
from qkd.distill.step import DistillStep
from qkd.training import Batch, Partner, Phase
from quantizers import Student, freeze_batch_norm


@dataclass(frozen=True)
class Distillation:
    """What a student's training is made of.

    Args:
        phases: Ready to train.
        partners: Nets that learn beside the student: modules of loss terms, a teacher that studies along.
    """

    phases: tuple[Phase, ...]
    partners: tuple[Partner, ...]


def distillation(
    config: RunConfig,
    phases: Sequence[PhaseConfig],
    student: Student,
    teacher: nn.Module,
    view: Callable[[Batch], Tensor] | None,
    *,
    net: nn.Module,
    splits: Splits,
) -> Distillation:
    """Return the phases of a distillation and the nets that learn beside the student.

    Args:
        config: Its ``student`` section has the loss terms.
        phases: Names, lengths and what is special about each.
        student: The net that is trained.
        teacher: Its parameters require a gradient afterwards only if a phase trains it.
        view: Gives the teacher's images; None where it sees the student's.
        net: The student's float net, for the shapes of its features.
        splits: The images, for their shape.

    Raises:
        ValueError: If a term or a tap cannot be used.
    """
    return _Builder(config, phases, student, teacher, view, net, splits).build()


def terms_of(config: RunConfig, phase: PhaseConfig) -> tuple[TermConfig, ...]:
    """Return the student's terms in a phase: its own, or the student's."""
    return config.student.terms if phase.terms is None else phase.terms


class _Builder:
    """Builds phases one after the other; they share nets, module banks and partners."""

    def __init__(
        self,
        config: RunConfig,
        phases: Sequence[PhaseConfig],
        student: Student,
        teacher: nn.Module,
        view: Callable[[Batch], Tensor] | None,
        net: nn.Module,
        splits: Splits,
    ) -> None:
        self.config, self.configs, self.student, self.teacher, self.view = config, phases, student, teacher, view
        self.studies = [phase for phase in phases if phase.teacher_terms is not None]
        teacher.requires_grad_(bool(self.studies))
        device = next(teacher.parameters()).device
        images = torch.zeros(2, splits.channels, splits.image_size, splits.image_size, device=device)
        own = [term for phase in phases for term in terms_of(config, phase)]
        others = [term for phase in self.studies for term in phase.teacher_terms or ()]
        net = net.to(device)
        self.bank = build_bank(net, teacher, own, images, seed=config.seed)
        self.teacher_bank = build_bank(teacher, net, others, images, seed=config.seed)

    def build(self) -> Distillation:
        phases, first_epoch = [], 0
        for phase in self.configs:
            phases.append(self._phase(phase, first_epoch))
            first_epoch += phase.epochs
        return Distillation(tuple(phases), self._partners())

    def _partners(self) -> tuple[Partner, ...]:
        banks = {"terms": self.bank, "teacher_terms": self.teacher_bank}
        partners = [Partner(name, bank.modules) for name, bank in banks.items() if len(bank.modules)]
        if self.studies:
            factors = {phase.teacher_lr_factor for phase in self.studies}
            if len(factors) > 1:
                raise ValueError(f"teacher_lr_factor must be the same in all phases, got {sorted(factors)}")
            partners.append(Partner("teacher", self.teacher, factors.pop()))
        return tuple(partners)

    def _phase(self, phase: PhaseConfig, first_epoch: int) -> Phase:
        terms = self._terms(terms_of(self.config, phase), self.bank)
        step = self._step(phase, terms, first_epoch)

        def enter() -> None:
            freeze_batch_norm(self.student, phase.freeze_batch_norm)
            self.teacher.train(phase.teacher_terms is not None)

        # the deployed arithmetic is float32: reduced precision would train something else
        allows_autocast = not phase.freeze_batch_norm
        return Phase(phase.name, phase.epochs, step, enter, step.tapped, allows_autocast, phase.rate_factor)

    def _step(self, phase: PhaseConfig, terms: WeightedTerms, first_epoch: int) -> DistillStep | CoStudyStep:
        nets, paths = (self.student, self.teacher), self.student.tap_paths
        if phase.teacher_terms is None:
            return DistillStep(*nets, terms, view=self.view, tap_paths=paths, first_epoch=first_epoch)
        taught = self._terms(phase.teacher_terms, self.teacher_bank)
        return CoStudyStep(*nets, terms, taught, view=self.view, tap_paths=paths, first_epoch=first_epoch)

    def _terms(self, terms: Sequence[TermConfig], bank: ModuleBank) -> WeightedTerms:
        return build_terms(terms, label_smoothing=self.config.student.train.label_smoothing, bank=bank)
