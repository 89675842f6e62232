"""Phase rules of peers, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.phase_checks import PhaseRule


def peer_phase(phase: PhaseConfig, terms: Sequence[TermConfig], keys: Collection[str]) -> PhaseRule:  # noqa: ARG001
    """Return the rule of a phase: if peers learn in it, their loss replaces the student's terms.

    Args:
        phase: As in the config.
        terms: Its own terms, or the student's.
        keys: The keys that are set in the student's section.
    """
    if "peers" not in keys or not phase.peers:
        return PhaseRule()
    return PhaseRule(tuple(_faults(phase)), brings_loss=True)


def _faults(phase: PhaseConfig) -> Iterator[tuple[str, str]]:
    if phase.trains == "modules":
        yield "trains", "`modules`, but its peers learn in this phase, and the student with them; set `peers: false`"
    if phase.combine == "clipped":
        yield "combine", "`clipped` combines the student's terms, not its peers' loss; set `peers: false`, or `sum`"
