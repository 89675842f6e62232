"""Phases that cannot be trained as they say are told before anything is run."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from qkd.config import PhaseConfig, TermConfig
from qkd.methods.phase_checks import phase_faults

TAPS = (("a", "a"), ("b", "b"))
LABELS = {"loss": "cross_entropy"}
SOFT = {"loss": "soft_target"}
GRAPH = {"loss": "multi_head_graph", "taps": TAPS}
ATTENTION = {"loss": "graph_attention", "taps": TAPS}
TERMS = (TermConfig.model_validate(LABELS), TermConfig.model_validate(SOFT))


def phase(*terms: dict[str, Any], **changes: Any) -> PhaseConfig:
    return PhaseConfig.model_validate({"epochs": 1, **({"terms": terms} if terms else {}), **changes})


def faults(*phases: PhaseConfig, **details: Any) -> list[tuple[int, str, str]]:
    return list(phase_faults(TERMS, phases, **details))


@pytest.mark.parametrize(
    "phases",
    [
        [phase()],
        [phase(combine="clipped")],
        [phase(LABELS, GRAPH | {"options": {"attention": "random"}})],
        [phase(ATTENTION, trains="modules"), phase(LABELS, GRAPH, combine="clipped")],
        [phase(ATTENTION, trains="modules"), phase(), phase(GRAPH)],
        [phase(LABELS, ATTENTION, GRAPH)],
        [phase(ATTENTION, trains="modules"), phase(GRAPH | {"options": {"heads": 4, "candidates": 2}})],
        [phase({"loss": "hint", "taps": TAPS}, trains="modules"), phase()],
        [phase({"loss": "no such loss"})],  # is told elsewhere
    ],
)
def test_phases_that_work(phases: list[PhaseConfig]) -> None:
    assert faults(*phases) == []


@pytest.mark.parametrize(
    ("phases", "index", "key", "message"),
    [
        ([phase(SOFT, trains="modules")], 0, "trains", "no term of the phase has one to train"),
        ([phase(trains="modules")], 0, "trains", "no term of the phase has one to train"),
        ([phase(ATTENTION)], 0, "terms", "none of them reads the student"),
        ([phase(), phase(LABELS, combine="clipped")], 1, "combine", "no term needs the teacher"),
        ([phase(SOFT, combine="clipped")], 0, "combine", "works without the teacher (e.g. cross_entropy)"),
        ([phase(LABELS, SOFT | {"weight": 0}, combine="clipped")], 0, "combine", "no term needs the teacher"),
        ([phase(LABELS, ATTENTION, combine="clipped")], 0, "combine", "no term needs the teacher"),
        ([phase(GRAPH), phase(ATTENTION, trains="modules")], 0, "terms", "nothing trains the attention of multi_head"),
        ([phase(ATTENTION | {"weight": 0}, LABELS), phase(GRAPH)], 1, "terms", "nothing trains the attention"),
        (
            [phase(ATTENTION | {"taps": TAPS[::-1]}, trains="modules"), phase(GRAPH)],
            1, "terms", "with the same taps and options `heads`",
        ),
        (
            [phase(ATTENTION | {"options": {"heads": 2}}, trains="modules"), phase(GRAPH)],
            1, "terms", "with the same taps and options `heads`",
        ),
    ],
)  # fmt: skip
def test_phases_that_do_not(phases: list[PhaseConfig], index: int, key: str, message: str) -> None:
    ((found_index, found_key, what),) = faults(*phases)
    assert (found_index, found_key) == (index, key)
    assert message in what


@pytest.mark.parametrize(
    ("phases", "index", "key", "message"),
    [
        ([phase(combine="clipped")], 0, "combine", "not its peers' loss; set `peers: false`"),
        ([phase(LABELS, SOFT, combine="clipped")], 0, "combine", "not its peers' loss"),
        ([phase(ATTENTION, trains="modules")], 0, "trains", "its peers learn in this phase"),
        ([phase(), phase(GRAPH, peers=False)], 1, "terms", "nothing trains the attention"),
    ],
)
def test_phases_that_peers_forbid(phases: list[PhaseConfig], index: int, key: str, message: str) -> None:
    ((found_index, found_key, what),) = faults(*phases, keys={"peers"})
    assert (found_index, found_key) == (index, key) and message in what
    assert faults(*(one.model_copy(update={"peers": False}) for one in phases[:index]), keys={"peers"}) == []


def test_with_peers_the_students_terms_teach_no_attention() -> None:
    terms = [TermConfig.model_validate(term) for term in (LABELS, ATTENTION)]
    own = phase(GRAPH, LABELS, peers=False)
    assert list(phase_faults(terms, [phase(), own])) == []
    ((index, key, what),) = phase_faults(terms, [phase(), own], keys={"peers"})
    assert (index, key) == (1, "terms") and "nothing trains the attention" in what
    assert list(phase_faults(terms, [phase(peers=False), own], keys={"peers"})) == []
    assert faults(phase(ATTENTION), phase(GRAPH), keys={"peers"}) == []  # the student learns from its peers


def test_what_a_teacher_cannot_learn_from() -> None:
    relation = {"loss": "class_relation"}
    ((index, key, what),) = faults(phase(), phase(teacher_terms=[LABELS, relation]))
    assert (index, key) == (1, "teacher_terms") and "class_relation reads a last layer in full precision" in what
    ((index, key, what),) = faults(phase(teacher_terms=[LABELS, GRAPH]))
    assert (index, key) == (0, "teacher_terms") and "nothing trains the attention" in what
    assert faults(phase(teacher_terms=[LABELS, ATTENTION, GRAPH])) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"combine": "clipped"}, "cannot be combined with `combine`: the student does not learn in this phase"),
        ({"freeze_batch_norm": True}, "cannot be combined with `freeze_batch_norm`"),
        ({"teacher_terms": [LABELS]}, "cannot be combined with `teacher_terms`"),
    ],
)
def test_a_student_that_stands_still_has_nothing_to_combine_or_freeze(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        phase(ATTENTION, trains="modules", **changes)


def test_a_teacher_that_learns_is_not_clipped_against() -> None:
    with pytest.raises(ValidationError, match="cannot be combined with `teacher_terms`"):
        phase(teacher_terms=[LABELS], combine="clipped")
