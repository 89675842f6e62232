"""Rounds as values: quantiles, exploit, lineages and the schedules they lived."""

from __future__ import annotations

import pytest

from qkd.agents import Op, Policy
from qkd.search import (
    Member,
    Score,
    SearchError,
    best_member,
    first_round,
    lineage,
    next_round,
    quantiles,
    schedule_of,
    start_policy,
)
from qkd.search.population import Round, last_round, round_lengths, waiting, with_score


def score(accuracy: float, *, is_diverged: bool = False) -> Score:
    return Score(accuracy, is_diverged, "" if is_diverged else "0" * 64, 10, 5, 0.1)


def scored(*accuracies: float) -> Round:
    return tuple(
        Member(member.index, Policy((Op("Rotate", 0.1, member.index % 10),)), member.index, score(accuracy))
        for member, accuracy in zip(first_round(len(accuracies)), accuracies, strict=True)
    )


def test_sixteen_members_have_quarters_of_four() -> None:
    accuracies = [0.5, 0.9, 0.1, 0.7, 0.3, 0.8, 0.2, 0.6, 0.55, 0.95, 0.15, 0.75, 0.35, 0.85, 0.25, 0.65]
    bottom, top = quantiles(scored(*accuracies))
    assert sorted(bottom) == sorted(sorted(range(16), key=lambda i: accuracies[i])[:4]) == [2, 6, 10, 14]
    assert sorted(top) == [1, 5, 9, 13] and top[0] == 9


@pytest.mark.parametrize(("members", "size"), [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2), (8, 2), (15, 4), (17, 5)])
def test_a_quarter_is_rounded_up_but_at_most_half(members: int, size: int) -> None:
    bottom, top = quantiles(scored(*(index / 20 for index in range(members))))
    assert len(bottom) == len(top) == size and not set(bottom) & set(top)


def test_equal_scores_favor_the_lower_index() -> None:
    assert quantiles(scored(0.5, 0.5, 0.5, 0.5)) == ((3,), (0,))


def test_only_the_bottom_quarter_copies_from_the_top_and_explores() -> None:
    population = scored(*(index / 16 for index in range(16)))
    donors = set()
    for number in range(40):
        following = next_round(population, seed=0, role="teacher", number=number)
        assert [member.index for member in following] == list(range(16))
        assert all(member.score is None for member in following)
        for before, member in zip(population, following, strict=True):
            if before.index < 4:
                assert member.source in {12, 13, 14, 15} and member.is_copy
                donors.add(member.source)
            else:
                assert member.source == member.index and member.policy == before.policy
    assert donors == {12, 13, 14, 15}
    assert any(member.policy != population[member.source].policy for member in following[:4])


def test_the_same_names_give_the_same_round() -> None:
    population = scored(0.1, 0.2, 0.3, 0.4)
    first = next_round(population, seed=0, role="teacher", number=3)
    assert next_round(population, seed=0, role="teacher", number=3) == first
    others = [next_round(population, seed=s, role=r, number=n)
              for s, r, n in ((1, "teacher", 3), (0, "student", 3), (0, "teacher", 4))]  # fmt: skip
    assert all(other != first for other in others)


def test_who_diverged_copies_and_is_never_copied() -> None:
    population = scored(0.9, 0.8, 0.7, 0.6)
    population = with_score(population, 0, score(0, is_diverged=True))
    population = with_score(population, 1, score(0, is_diverged=True))
    bottom, top = quantiles(population)
    assert set(bottom) == {0, 1} and top == (2,)
    alone = with_score(with_score(population, 2, score(0, is_diverged=True)), 3, score(0.6))
    assert set(quantiles(alone)[0]) == {0, 1, 2} and quantiles(alone)[1] == (3,)
    lost = with_score(alone, 3, score(0, is_diverged=True))
    with pytest.raises(SearchError, match=r"every member .* has diverged; lower train\.lr"):
        quantiles(lost)
    with pytest.raises(ValueError, match="needs? the scores|need the scores"):
        quantiles(first_round(4))


def test_in_the_last_round_the_top_quarter_goes_on() -> None:
    population = scored(0.1, 0.5, 0.4, 0.3, 0.2, 0.9, 0.8, 0.7)
    last = last_round(population)
    assert [member.index for member in last if not member.rests] == [5, 6] == waiting(last)
    assert [member.policy for member in last] == [member.policy for member in population]
    one = with_score(last, 5, score(0, is_diverged=True))
    assert waiting(one) == [6]
    both = with_score(one, 6, score(0, is_diverged=True))
    assert waiting(both) == [0, 1, 2, 3, 4, 7]  # all finalists are lost: the others are called
    assert waiting(with_score(one, 6, score(0.5))) == []
    assert best_member([population, with_score(one, 6, score(0.5))]) == 6


def test_a_lineage_goes_back_through_copies_and_its_segments_add_up() -> None:
    policies = [Policy((Op("Invert", 0.1 * k, k),)) for k in range(4)]
    start = start_policy()
    history = [
        (Member(0, start, 0, score(0.5)), Member(1, start, 1, score(0.6))),
        (Member(0, policies[1], 1, score(0.7)), Member(1, start, 1, score(0.6))),
        (Member(0, policies[1], 0, score(0.8)), Member(1, policies[2], 0, score(0.9))),
    ]
    line = lineage(history, 1)
    assert [member.index for member in line] == [1, 0, 1]
    schedule = schedule_of(line, (3, 3, 2))
    assert [(segment.epochs, segment.policy) for segment in schedule.segments] == [
        (3, start), (3, policies[1]), (2, policies[2])
    ]  # fmt: skip
    assert schedule.epochs == 8
    merged = schedule_of(lineage(history, 0), (3, 3, 2))
    assert [(s.epochs, s.policy) for s in merged.segments] == [(3, start), (5, policies[1])]
    assert best_member(history) == 1
    with pytest.raises(ValueError, match="zip"):
        schedule_of(line, (3, 3))


def test_the_best_of_equal_ones_has_the_better_past() -> None:
    history = [
        tuple(Member(i, start_policy(), i, score(a)) for i, a in enumerate(accuracies))
        for accuracies in ((0.2, 0.3, 0.3), (0.9, 0.9, 0.9))
    ]
    assert best_member(history) == 1


def test_rounds_fill_the_epochs() -> None:
    assert round_lengths(200, 3) == (3,) * 66 + (2,) and sum(round_lengths(200, 3)) == 200
    assert round_lengths(6, 3) == (3, 3) and round_lengths(2, 3) == (2,)
