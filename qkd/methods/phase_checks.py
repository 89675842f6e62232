"""Check that phases can train what they claim: gradients to combine, modules to train, attention before its use."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from qkd.config import PhaseConfig, StudentConfig, TermConfig
from qkd.methods.table import phase_rules
from qkd.terms.loss_table import LOSSES

PhaseFault = tuple[int, str, str]


@dataclass(frozen=True)
class PhaseRule:
    """A method's rule of a phase, from a function ``(phase, terms, keys)`` in its folder, in the table as ``phases``.

    Args:
        faults: Key of the phase and its fault.
        brings_loss: Whether the student's terms do not apply, nor the requirements on their weighted sum.
        more_terms: Key of the phase -> terms of another net, which shares no modules with the student's.
    """

    faults: Sequence[tuple[str, str]] = ()
    brings_loss: bool = False
    more_terms: Mapping[str, Sequence[TermConfig]] = field(default_factory=dict)


def student_faults(student: StudentConfig, phases: Sequence[PhaseConfig]) -> list[str]:
    """Return the faults of a student's phases, one per line with its location.

    Args:
        student: Its terms, and the nets that learn with it.
        phases: In order; a student's own, or those used instead.
    """
    found = phase_faults(student.terms, phases, keys=set_keys(dict(student)))
    return [f"phases[{index}].{key}: {what}" for index, key, what in found]


def set_keys(section: Mapping[str, object]) -> set[str]:
    """Return the keys of a section that have a value."""
    return {key for key, value in section.items() if value is not None}


def phase_faults(
    terms: Sequence[TermConfig], phases: Sequence[PhaseConfig], *, keys: Collection[str] = ()
) -> Iterator[PhaseFault]:
    """Yield ``(index, key, fault)`` for each phase that cannot be trained as configured.

    Unknown losses are skipped: :func:`~qkd.terms.term_checks.check_terms` names them.

    Args:
        terms: The student's, for phases without their own.
        phases: In order.
        keys: The keys that are set in the student's section: they request methods.

    Yields:
        Index of the phase, from 0; the key of its config; a sentence.
    """
    taught: dict[str, set[str]] = {}  # one bank of modules for each key
    rules = phase_rules()
    for index, phase in enumerate(phases):
        own = counting(terms if phase.terms is None else phase.terms)
        said = [rule(phase, own, keys) for rule in rules]
        brings_loss = any(one.brings_loss for one in said)
        own = [] if brings_loss and phase.terms is None else own
        more = {key: counting(chosen) for one in said for key, chosen in one.more_terms.items()}
        for key, chosen in ({"terms": own} | more).items():
            known = taught.setdefault(key, set())
            known |= {_module_key(term) for term in chosen}
            yield from ((index, key, _untaught(term)) for term in chosen if not _is_taught(term, known))
        found = [fault for one in said for fault in one.faults]
        yield from ((index, key, what) for key, what in [*found, *([] if brings_loss else _faults(phase, own))])


def _faults(phase: PhaseConfig, terms: Sequence[TermConfig]) -> Iterator[tuple[str, str]]:
    entries = [LOSSES[term.loss] for term in terms]
    if phase.trains == "modules" and all(entry.module is None for entry in entries):
        yield "trains", "`modules`, but no term of the phase has one to train (e.g. graph_attention, hint)"
    if phase.trains == "student" and entries and not any(entry.needs_student for entry in entries):
        yield "terms", "none of them reads the student, so the student learns nothing; set `trains: modules`"
    if phase.combine == "clipped":
        sides = {entry.is_distillation for entry in entries if entry.needs_student}
        if sides != {True, False}:
            missing = "needs the teacher" if sides == {False} else "works without the teacher (e.g. cross_entropy)"
            yield "combine", f"`clipped` weighs two gradients against each other, but no term {missing}"


def counting(terms: Sequence[TermConfig]) -> list[TermConfig]:
    """Return the terms with a nonzero weight and a known loss."""
    return [term for term in terms if term.weight > 0 and term.loss in LOSSES]


def _is_taught(term: TermConfig, taught: Collection[str]) -> bool:
    entry = LOSSES[term.loss]
    wants = bool(entry.taught_by) and term.options.get("attention", "trained") == "trained"
    return not wants or _module_key(term, entry.taught_by) in taught


def _untaught(term: TermConfig) -> str:
    teacher = LOSSES[term.loss].taught_by
    return (
        f"nothing trains the attention of {term.loss}: let a phase with {teacher}, with the same taps and options "
        f"`heads`, come first (trains: modules), or set its option `attention` to `random`, as in role-kd's released "
        f"code"
    )


def _module_key(term: TermConfig, loss: str = "") -> str:
    """Return the key that is equal for terms that share a module; see :class:`~qkd.terms.modules.ModuleBank`."""
    entry = LOSSES[loss or term.loss]
    shaping = entry.module.options if entry.module is not None else ()
    values = {name: term.options.get(name, entry.options[name].default) for name in shaping}
    return json.dumps([loss or term.loss, term.taps, values], sort_keys=True)
