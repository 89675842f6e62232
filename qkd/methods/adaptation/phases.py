"""Phase rules of domain adaptation, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.phase_checks import PhaseRule


def adaptation_phase(phase: PhaseConfig, terms: Sequence[TermConfig], keys: Collection[str]) -> PhaseRule:  # noqa: ARG001
    """Return the rule of a phase: one without its own terms adapts, with the method's loss.

    Args:
        phase: As in the config.
        terms: Its own terms, or the student's.
        keys: The keys that are set in the student's section.
    """
    if "adaptation" not in keys or phase.terms is not None:
        return PhaseRule()
    return PhaseRule(tuple(_faults(phase)), brings_loss=True)


def _faults(phase: PhaseConfig) -> Iterator[tuple[str, str]]:
    if phase.trains == "modules":
        yield (
            "trains",
            "`modules`, but teacher and student learn in this phase; give it `terms`, or set `trains: student`",
        )
    if phase.combine == "clipped":
        yield "combine", "`clipped` combines the student's terms, not the adaptation loss; set `sum`"
