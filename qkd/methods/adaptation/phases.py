"""What domain adaptation says of a phase, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.phase_checks import PhaseRule


def adaptation_phase(phase: PhaseConfig, terms: Sequence[TermConfig], keys: Collection[str]) -> PhaseRule:  # noqa: ARG001
    """Return the rule of a phase: one without its own terms adapts, and its loss is the method's.

    Args:
        phase: As the config has it.
        terms: Its own, or the student's.
        keys: Of the student's section, those that are set.
    """
    if "adaptation" not in keys or phase.terms is not None:
        return PhaseRule()
    return PhaseRule(tuple(_faults(phase)), brings_loss=True)


def _faults(phase: PhaseConfig) -> Iterator[tuple[str, str]]:
    if phase.trains == "modules":
        yield "trains", "`modules`, but teacher and student learn in this phase; give it `terms`, or `trains: student`"
    if phase.combine == "clipped":
        yield "combine", "`clipped` weighs terms of the student's, not the loss of an adaptation; say `sum`"
