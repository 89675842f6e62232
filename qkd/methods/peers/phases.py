"""What peers say of a phase, before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.phase_checks import PhaseRule


def peer_phase(phase: PhaseConfig, terms: Sequence[TermConfig], keys: Collection[str]) -> PhaseRule:  # noqa: ARG001
    """Return the rule of a phase: where peers learn along, their loss takes the place of the student's terms.

    Args:
        phase: As the config has it.
        terms: Its own, or the student's.
        keys: Of the student's section, those that are set.
    """
    if "peers" not in keys or not phase.peers:
        return PhaseRule()
    return PhaseRule(tuple(_faults(phase)), brings_loss=True)


def _faults(phase: PhaseConfig) -> Iterator[tuple[str, str]]:
    if phase.trains == "modules":
        yield "trains", "`modules`, but its peers learn in this phase, and the student with them; say `peers: false`"
    if phase.combine == "clipped":
        yield "combine", "`clipped` weighs terms of the student's, not its peers' loss; say `peers: false`, or `sum`"
