"""Look whether phases can teach what they say: gradients to combine, modules to train, attention before its use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from qkd.config import PhaseConfig, StudentConfig, TermConfig
from qkd.terms.loss_table import LOSSES

PhaseFault = tuple[int, str, str]


def student_faults(student: StudentConfig, phases: Sequence[PhaseConfig]) -> list[str]:
    """Return what is wrong with a student's phases, a line each with the place.

    Args:
        student: Its terms, and what learns beside it.
        phases: In order; a student's own, or those that stand for them.
    """
    found = phase_faults(student.terms, phases, has_peers=student.peers is not None)
    return [f"phases[{index}].{key}: {what}" for index, key, what in found]


def phase_faults(
    terms: Sequence[TermConfig], phases: Sequence[PhaseConfig], *, has_peers: bool = False
) -> Iterator[PhaseFault]:
    """Yield ``(index, key, what is wrong)`` for each phase that cannot be trained as it says.

    Losses that are unknown are passed over: :func:`~qkd.terms.term_checks.check_terms` names them.

    Args:
        terms: The student's, for phases without their own.
        phases: In order.
        has_peers: Whether the student has any; in a phase where they learn along, its own terms do not apply.

    Yields:
        Index of the phase, from 0; the key of its config; a sentence.
    """
    taught: dict[str, set[str]] = {"terms": set(), "teacher_terms": set()}  # one bank of modules each
    for index, phase in enumerate(phases):
        shared = () if has_peers and phase.peers else terms
        own = [term for term in (shared if phase.terms is None else phase.terms) if _counts(term)]
        others = [term for term in phase.teacher_terms or () if _counts(term)]
        for key, chosen in (("terms", own), ("teacher_terms", others)):
            taught[key] |= {_module_key(term) for term in chosen}
            for term in chosen:
                if _wants_teaching(term) and _module_key(term, LOSSES[term.loss].taught_by) not in taught[key]:
                    yield index, key, _untaught(term)
        for term in others:
            if "class_weights" in LOSSES[term.loss].inputs:
                yield index, "teacher_terms", f"{term.loss} reads a last layer in full precision; the student has none"
        found = _peer_faults(phase) if has_peers and phase.peers else _faults(phase, own)
        yield from ((index, key, what) for key, what in found)


def _peer_faults(phase: PhaseConfig) -> Iterator[tuple[str, str]]:
    if phase.trains == "modules":
        yield "trains", "`modules`, but its peers learn in this phase, and the student with them; say `peers: false`"
    if phase.combine == "clipped":
        yield "combine", "`clipped` weighs terms of the student's, not its peers' loss; say `peers: false`, or `sum`"


def _faults(phase: PhaseConfig, terms: Sequence[TermConfig]) -> Iterator[tuple[str, str]]:
    entries = [LOSSES[term.loss] for term in terms]
    if phase.trains == "modules" and all(entry.module is None for entry in entries):
        yield "trains", "`modules`, but no term of the phase has one to train (e.g. graph_attention, hint)"
    if phase.trains == "student" and entries and not any(entry.needs_student for entry in entries):
        yield "terms", "none of them reads the student, so it learns nothing; set `trains: modules`"
    if phase.meta is not None:
        yield from (("meta", what) for what in _meta_faults(phase, terms))
    if phase.combine == "clipped":
        sides = {entry.is_distillation for entry in entries if entry.needs_student}
        if sides != {True, False}:
            missing = "needs the teacher" if sides == {False} else "does without the teacher (e.g. cross_entropy)"
            yield "combine", f"`clipped` weighs two gradients against each other, but no term {missing}"


def _meta_faults(phase: PhaseConfig, terms: Sequence[TermConfig]) -> Iterator[str]:
    if phase.combine == "clipped":
        yield "the step that the quiz judges follows the plain sum of the terms; set `combine: sum`"
    if phase.trains == "modules":
        yield "the student stands still with `trains: modules`, so a quiz tells nothing of its teacher"
    entries = {term.loss: LOSSES[term.loss] for term in terms}
    if not any(entry.is_distillation for entry in entries.values()):
        yield "no term of the phase reads the teacher, so a quiz cannot teach it; add one, e.g. soft_target"
    deaf = [name for name, entry in entries.items() if not entry.teaches]
    if deaf:
        yield f"no gradient passes {', '.join(deaf)} into the teacher, so a quiz cannot teach through it; use others"


def _counts(term: TermConfig) -> bool:
    return term.weight > 0 and term.loss in LOSSES


def _wants_teaching(term: TermConfig) -> bool:
    return bool(LOSSES[term.loss].taught_by) and term.options.get("attention", "trained") == "trained"


def _untaught(term: TermConfig) -> str:
    teacher = LOSSES[term.loss].taught_by
    return (
        f"nothing trains the attention of {term.loss}: let a phase with {teacher}, with the same taps and options "
        f"`heads`, come first (trains: modules), or set its option `attention` to `random`, as in role-kd's released "
        f"code"
    )


def _module_key(term: TermConfig, loss: str = "") -> str:
    """Return what tells whether two terms share a module; see :class:`~qkd.terms.modules.ModuleBank`."""
    entry = LOSSES[loss or term.loss]
    shaping = entry.module.options if entry.module is not None else ()
    values = {name: term.options.get(name, entry.options[name].default) for name in shaping}
    return json.dumps([loss or term.loss, term.taps, values], sort_keys=True)
