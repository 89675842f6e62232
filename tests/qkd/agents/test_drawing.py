"""Draws: how many operations an image gets, which ones, in which order, and that a seed repeats them."""

from __future__ import annotations

import collections
import random

import pytest
import torch

from qkd.agents import PBA_OPERATIONS, Op, Policy, Schedule, Segment
from qkd.agents.drawing import NONE, PolicyDraws, RandAugmentDraws, TrivialDraws, draw_from_policy

N = 20_000


def walk(policy: Policy, rng: random.Random) -> tuple[int, ...]:
    """Draw one image's operations as the paper's loop does."""
    left = rng.choices((0, 1, 2), (0.2, 0.3, 0.5))[0]
    ops, fired = list(policy.ops), []
    rng.shuffle(ops)
    for op in ops:
        if left == 0:
            break
        if rng.random() < op.probability:
            fired.append(PBA_OPERATIONS.index(op.name))
            left -= 1
    return tuple(fired)


def shares(rows: list[tuple[int, ...]]) -> collections.Counter[tuple[int, ...]]:
    return collections.Counter(rows)


def drawn_rows(policy: Policy) -> list[tuple[int, ...]]:
    drawn = draw_from_policy(policy, N, torch.Generator().manual_seed(3))
    return [tuple(kind for kind in row if kind != NONE) for row in drawn.kinds.tolist()]


def test_counts_are_drawn_with_the_published_probabilities() -> None:
    policy = Policy(tuple(Op(name, 1.0, 5) for name in PBA_OPERATIONS * 2))
    counts = collections.Counter(len(row) for row in drawn_rows(policy))
    for count, chance in ((0, 0.2), (1, 0.3), (2, 0.5)):
        assert counts[count] / N == pytest.approx(chance, abs=4 * 0.5 / N**0.5)


@pytest.mark.parametrize(
    "policy",
    [
        Policy((Op("Rotate", 0.9, 1), Op("Invert", 0.5, 2), Op("Color", 0.1, 3))),
        Policy((Op("Rotate", 1.0, 1), Op("Rotate", 0.2, 4), Op("Cutout", 0.0, 3), Op("ShearX", 0.6, 9))),
        Policy((Op("Equalize", 0.4, 0),)),
    ],
)
def test_operations_are_drawn_as_by_the_papers_loop(policy: Policy) -> None:
    rng = random.Random(1)
    expected = shares([walk(policy, rng) for _ in range(N)])
    found = shares(drawn_rows(policy))
    assert sum(expected.values()) == sum(found.values()) == N
    for row in expected | found:
        # Two independent samples of N: five standard deviations of their difference.
        spread = 5 * (2 * N * max(expected[row], found[row], 25) / N) ** 0.5
        assert abs(expected[row] - found[row]) < spread, row


def test_an_operation_brings_its_own_magnitude() -> None:
    policy = Policy((Op("Rotate", 1.0, 1), Op("Invert", 1.0, 2), Op("Rotate", 1.0, 7)))
    drawn = draw_from_policy(policy, N, torch.Generator().manual_seed(0))
    pairs = set(zip(drawn.kinds.flatten().tolist(), drawn.levels.flatten().tolist(), strict=True))
    rotate, invert = PBA_OPERATIONS.index("Rotate"), PBA_OPERATIONS.index("Invert")
    assert {pair for pair in pairs if pair[0] != NONE} == {(rotate, 1), (rotate, 7), (invert, 2)}


def test_an_empty_policy_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert draw_from_policy(Policy(), 5, generator).kinds.shape == (5, 0)
    assert torch.equal(generator.get_state(), before)


def test_a_schedule_draws_from_the_epochs_policy() -> None:
    draws = PolicyDraws(Schedule((Segment(1, Policy()), Segment(1, Policy((Op("Invert", 1.0, 0),))))))
    assert draws.draw(50, 1, 4, torch.Generator().manual_seed(0)).kinds.shape == (50, 0)
    late = draws.draw(50, 2, 4, torch.Generator().manual_seed(0)).kinds
    assert set(late.flatten().tolist()) == {NONE, PBA_OPERATIONS.index("Invert")}


def test_trivial_draws_one_operation_of_any_kind_and_magnitude() -> None:
    drawn = TrivialDraws().draw(N, 0, 1, torch.Generator().manual_seed(0))
    assert drawn.kinds.shape == (N, 1)
    for values, number in ((drawn.kinds, 15), (drawn.levels, 10)):
        shares_ = torch.bincount(values.flatten(), minlength=number) / N
        assert torch.allclose(shares_, torch.full((number,), 1 / number), atol=0.01)


def test_randaugment_draws_so_many_at_one_magnitude() -> None:
    drawn = RandAugmentDraws(3, 7).draw(N, 0, 1, torch.Generator().manual_seed(0))
    assert drawn.kinds.shape == (N, 3)
    assert set(drawn.levels.flatten().tolist()) == {7}
    assert set(drawn.kinds.flatten().tolist()) == set(range(15))


def test_a_seed_repeats_the_draws() -> None:
    policy = Policy(tuple(Op(name, 0.5, 5) for name in PBA_OPERATIONS))
    first, second, other = (draw_from_policy(policy, 64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.kinds, second.kinds)
    assert not torch.equal(first.kinds, other.kinds)
