"""The search space: the start, and how explore moves each integer."""

from __future__ import annotations

import collections
import random

import pytest

from qkd.agents import PBA_OPERATIONS, Op, Policy
from qkd.search import explore, start_policy
from qkd.search.space import tenths

DRAWS = 3000


def integers(policy: Policy) -> list[int]:
    return [value for op in policy.ops for value in (tenths(op), op.magnitude)]


def test_the_start_is_sixty_zeros_in_the_published_order() -> None:
    start = start_policy()
    assert [op.name for op in start.ops] == list(PBA_OPERATIONS) * 2
    assert integers(start) == [0] * 60


def expected(value: int, largest: int) -> dict[int, float]:
    """Return the probability of each new value, worked out from the rule itself."""
    chances = collections.Counter[int]()
    for new in range(largest + 1):
        chances[new] += 0.2 / (largest + 1)
    for step in range(4):
        chances[min(largest, value + step)] += 0.8 / 8
        chances[max(0, value - step)] += 0.8 / 8
    return dict(chances)


@pytest.mark.parametrize("value", [0, 2, 5, 9])
def test_explore_has_the_published_distribution(value: int) -> None:
    rng = random.Random(value)
    policy = Policy(tuple(Op(name, value / 10, value) for name in PBA_OPERATIONS))
    found = (collections.Counter[int](), collections.Counter[int]())
    for _ in range(DRAWS // len(policy.ops) * 10):
        for op in explore(policy, rng).ops:
            found[0][tenths(op)] += 1
            found[1][op.magnitude] += 1
    for counts, largest in zip(found, (10, 9), strict=True):
        total = sum(counts.values())
        assert set(counts) <= set(range(largest + 1))
        chances = expected(value, largest)
        assert sum(chances.values()) == pytest.approx(1)
        # chi-square with at most 10 degrees of freedom: 45 has a probability below 1e-5
        assert sum((counts[k] - total * p) ** 2 / (total * p) for k, p in chances.items()) < 45


def test_the_expected_distribution_is_told_from_another_rule() -> None:
    assert expected(5, 10)[5] == pytest.approx(0.2 / 11 + 0.8 / 4)
    assert expected(0, 9)[0] == pytest.approx(0.2 / 10 + 0.8 * 5 / 8)  # every step down is clipped


def test_explore_keeps_the_operations_and_the_policy_it_is_given() -> None:
    policy = start_policy()
    new = explore(policy, random.Random(0))
    assert [op.name for op in new.ops] == [op.name for op in policy.ops] and new != policy == start_policy()
    assert explore(policy, random.Random(0)) == new
    assert all(round(op.probability * 10) / 10 == op.probability for op in new.ops)


def test_about_a_tenth_of_the_integers_moves_by_more_than_three() -> None:
    """The published log has 9.4 %; from the middle of the range it is 0.2 x 4 / 11 and 0.2 x 3 / 10."""
    rng = random.Random(1)
    middle = Policy(tuple(Op(name, 0.5, 5) for name in PBA_OPERATIONS) * 2)
    moved = [abs(value - 5) > 3 for _ in range(200) for value in integers(explore(middle, rng))]
    assert sum(moved) / len(moved) == pytest.approx((0.2 * 4 / 11 + 0.2 * 3 / 10) / 2, abs=0.01)
