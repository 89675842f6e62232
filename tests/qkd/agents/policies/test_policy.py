"""Policies and schedules as values: what they refuse, and how a schedule is stretched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qkd.agents import PBA_OPERATIONS, Op, Policy, Schedule, Segment

EARLY, LATE = Policy(), Policy((Op("Rotate", 0.5, 3),))


def test_there_are_fifteen_operations_in_the_published_order() -> None:
    """Of a Python 2.7 dictionary: two that change places would silently permute every published policy."""
    words = (
        "Rotate TranslateX TranslateY Brightness Color Invert Sharpness Posterize ShearX Solarize ShearY Equalize "
        "AutoContrast Cutout Contrast"
    )
    assert tuple(words.split()) == PBA_OPERATIONS


@pytest.mark.parametrize(
    ("name", "probability", "magnitude", "message"),
    [
        ("Rotat", 0.5, 3, "did you mean 'Rotate'"),
        ("shearx", 0.5, 3, "did you mean 'ShearX'"),
        ("Rotate", 1.1, 3, "probability from 0 to 1, got 1.1"),
        ("Rotate", -0.1, 3, "probability from 0 to 1"),
        ("Rotate", float("nan"), 3, "probability from 0 to 1"),
        ("Rotate", "0.5", 3, "probability from 0 to 1, got '0.5'"),
        ("Rotate", True, 3, "probability from 0 to 1"),
        ("Rotate", 0.5, 10, "magnitude from 0 to 9, got 10"),
        ("Rotate", 0.5, -1, "magnitude from 0 to 9"),
        ("Rotate", 0.5, 3.0, "magnitude from 0 to 9, got 3.0"),
        ("Rotate", 0.5, True, "magnitude from 0 to 9"),
    ],
)
def test_an_operation_out_of_range_is_refused(name: str, probability: float, magnitude: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Op(name, probability, magnitude)


def test_an_operation_tells_all_its_faults_at_once() -> None:
    with pytest.raises(ValueError, match=r"name:.*probability:.*magnitude:"):
        Op("Zoom", 2, 12)


def test_a_policy_holds_operations_only() -> None:
    with pytest.raises(TypeError, match="must consist of Op values"):
        Policy((("Rotate", 0.5, 3),))  # type: ignore[arg-type]


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True])
def test_a_segment_needs_positive_epochs(epochs: int) -> None:
    with pytest.raises(ValueError, match="positive number of epochs"):
        Segment(epochs, EARLY)


def test_a_schedule_needs_a_segment() -> None:
    with pytest.raises(ValueError, match="at least one segment"):
        Schedule(())


def test_epochs_follow_the_segments() -> None:
    schedule = Schedule(((2, EARLY), (3, LATE)))  # type: ignore[arg-type]
    assert schedule.epochs == 5
    assert [schedule.at(epoch) for epoch in range(5)] == [EARLY, EARLY, LATE, LATE, LATE]


def test_a_schedule_is_stretched_as_published() -> None:
    # The best published 2-bit student schedule: int(n * 30 / 200) = 8, 0, 10, 5, 4; the last one fills up to 30.
    policies = [Policy((Op("Rotate", 0.1 * n, n),)) for n in range(5)]
    schedule = Schedule(tuple(Segment(n, p) for n, p in zip((57, 3, 72, 39, 29), policies, strict=True)))
    assert [(one.epochs, one.policy) for one in schedule.stretched(30).segments] == [
        (8, policies[0]),
        (10, policies[2]),
        (5, policies[3]),
        (7, policies[4]),
    ]
    assert schedule.at(29, 30) == policies[4]
    assert schedule.stretched(200) == schedule


@given(st.lists(st.integers(1, 90), min_size=1, max_size=7), st.integers(1, 300))
def test_a_stretched_schedule_has_the_length_asked_for_and_the_order_kept(lengths: list[int], total: int) -> None:
    policies = [Policy((Op("Rotate", 0.0, n),)) for n in range(len(lengths))]
    schedule = Schedule(tuple(Segment(n, p) for n, p in zip(lengths, policies, strict=True)))
    expected = [policy for n, policy in zip(lengths, policies, strict=True) for _ in range(n * total // sum(lengths))]
    expected += [policies[-1]] * (total - len(expected))
    assert [schedule.at(epoch, total) for epoch in range(total)] == expected
    assert schedule.stretched(total).epochs == total


@pytest.mark.parametrize("epoch", [-1, 5])
def test_an_epoch_outside_the_training_is_refused(epoch: int) -> None:
    with pytest.raises(ValueError, match=r"epoch must be 0\.\.4"):
        Schedule(((5, EARLY),)).at(epoch)  # type: ignore[arg-type]


def test_a_training_needs_epochs() -> None:
    with pytest.raises(ValueError, match="total_epochs"):
        Schedule((Segment(5, EARLY),)).stretched(0)
