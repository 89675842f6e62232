"""Phase rules of co-study, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.phase_checks import PhaseRule, counting
from qkd.terms.loss_table import LOSSES


def co_study_phase(phase: PhaseConfig, terms: Sequence[TermConfig], keys: Collection[str]) -> PhaseRule:  # noqa: ARG001
    """Return the rule of a phase: the teacher's terms have their own modules, and treat the student as a teacher.

    Args:
        phase: As in the config.
        terms: Its own terms, or the student's.
        keys: The keys that are set in the student's section.
    """
    others = phase.teacher_terms or ()
    faults = [
        ("teacher_terms", f"{term.loss} reads a last layer in full precision; the student has none")
        for term in counting(others)
        if "class_weights" in LOSSES[term.loss].inputs
    ]
    return PhaseRule(faults, more_terms={"teacher_terms": others})
