"""Phase rules of MetaDistil, checked before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.phase_checks import PhaseRule
from qkd.terms.loss_table import LOSSES


def meta_phase(phase: PhaseConfig, terms: Sequence[TermConfig], keys: Collection[str]) -> PhaseRule:  # noqa: ARG001
    """Return the rule of a phase: a quiz needs terms through which it reaches the teacher.

    Args:
        phase: As in the config.
        terms: Its own terms, or the student's.
        keys: The keys that are set in the student's section.
    """
    return PhaseRule() if phase.meta is None else PhaseRule([("meta", what) for what in _faults(phase, terms)])


def _faults(phase: PhaseConfig, terms: Sequence[TermConfig]) -> Iterator[str]:
    if phase.combine == "clipped":
        yield "the quiz judges a step on the plain sum of the terms; set `combine: sum`"
    if phase.trains == "modules":
        yield "with `trains: modules` the student does not learn, so a quiz says nothing about its teacher"
    entries = {term.loss: LOSSES[term.loss] for term in terms}
    if not any(entry.is_distillation for entry in entries.values()):
        yield "no term of the phase reads the teacher, so a quiz cannot teach it; add one, e.g. soft_target"
    deaf = [name for name, entry in entries.items() if not entry.teaches]
    if deaf:
        yield f"no gradient flows through {', '.join(deaf)} into the teacher, so a quiz cannot use it; use others"
