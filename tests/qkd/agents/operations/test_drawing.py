"""Draws: how many operations an image gets, which ones, in which order, and that a seed repeats them."""

from __future__ import annotations

import collections
import random

import numpy as np
import pytest

from qkd.agents import PBA_OPERATIONS, Op, Policy, Schedule, Segment
from qkd.agents.operations.counting import SampleDraws
from qkd.agents.operations.drawing import NONE, Drawn, PolicyDraws, RandAugmentDraws, TrivialDraws
from qkd.agents.policies.spaces import RANDAUGMENT, TRIVIAL_WIDE

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


def draws(count: int = N, key: int = 3) -> SampleDraws:
    return SampleDraws(key, np.arange(count))


def draw_from_policy(policy: Policy, key: int = 3) -> Drawn:
    return PolicyDraws(Schedule((Segment(1, policy),))).draw(draws(N, key), 0, 1)


def drawn_rows(policy: Policy) -> list[tuple[int, ...]]:
    drawn = draw_from_policy(policy)
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
    drawn = draw_from_policy(policy)
    pairs = set(zip(drawn.kinds.flatten().tolist(), drawn.levels.flatten().tolist(), strict=True))
    rotate, invert = PBA_OPERATIONS.index("Rotate"), PBA_OPERATIONS.index("Invert")
    assert {pair for pair in pairs if pair[0] != NONE} == {(rotate, 1), (rotate, 7), (invert, 2)}


def test_a_schedule_draws_from_the_epochs_policy() -> None:
    schedule = PolicyDraws(Schedule((Segment(1, Policy()), Segment(1, Policy((Op("Invert", 1.0, 0),))))))
    assert schedule.draw(draws(50), 1, 4).kinds.shape == (50, 0)
    late = schedule.draw(draws(50), 2, 4).kinds
    assert set(late.flatten().tolist()) == {NONE, PBA_OPERATIONS.index("Invert")}
    with pytest.raises(ValueError, match=r"epoch must be 0\.\.3"):
        schedule.draw(draws(50), 4, 4)


def test_flattened_every_image_takes_the_policy_of_a_random_epoch() -> None:
    segments = (Segment(1, Policy((Op("Invert", 1.0, 0),))), Segment(3, Policy((Op("Rotate", 1.0, 4),))))
    flat = PolicyDraws(Schedule(segments), flatten=True)
    for epoch in (0, 7):
        kinds = flat.draw(draws(), epoch, 8).kinds.flatten()
        shares_ = {name: float((kinds == PBA_OPERATIONS.index(name)).mean()) for name in ("Invert", "Rotate")}
        assert shares_["Invert"] == pytest.approx(0.8 / 4, abs=0.015)  # 0.8 of the images get an operation at all
        assert shares_["Rotate"] == pytest.approx(0.8 * 3 / 4, abs=0.015)


@pytest.mark.parametrize("space", [TRIVIAL_WIDE, RANDAUGMENT])
def test_torchvisions_spaces_have_its_operations(space: object) -> None:
    from torchvision.transforms import v2

    theirs = {TRIVIAL_WIDE: v2.TrivialAugmentWide, RANDAUGMENT: v2.RandAugment}[space]  # type: ignore[index]
    assert set(space.operations) == set(theirs._AUGMENTATION_SPACE)  # type: ignore[attr-defined]


def test_trivial_draws_one_operation_of_any_kind_and_magnitude() -> None:
    drawn = TrivialDraws().draw(draws(), 0, 1)
    assert drawn.kinds.shape == (N, 1) and drawn.space is TRIVIAL_WIDE
    kinds, counts = np.unique(drawn.kinds, return_counts=True)
    names = {"Identity" if kind == NONE else PBA_OPERATIONS[kind] for kind in kinds}
    assert names == set(TRIVIAL_WIDE.operations)
    assert np.allclose(counts / N, 1 / 14, atol=0.01)
    assert np.allclose(np.bincount(drawn.levels[:, 0], minlength=31) / N, 1 / 31, atol=0.01)


def test_randaugment_draws_so_many_at_one_magnitude() -> None:
    drawn = RandAugmentDraws(3, 17).draw(draws(), 0, 1)
    assert drawn.kinds.shape == (N, 3)
    assert set(drawn.levels.flatten().tolist()) == {17}
    assert len(set(drawn.kinds.flatten().tolist())) == 14
    pairs = np.bincount((drawn.kinds[:, 0] + 1) * 16 + drawn.kinds[:, 1] + 1, minlength=256)
    assert np.allclose(pairs[pairs > 0] / N, 1 / 196, atol=0.003)  # independent of each other
    assert (pairs > 0).sum() == 196


def test_a_key_repeats_the_draws() -> None:
    policy = Policy(tuple(Op(name, 0.5, 5) for name in PBA_OPERATIONS))
    first, second, other = (draw_from_policy(policy, key) for key in (1, 1, 2))
    assert np.array_equal(first.kinds, second.kinds)
    assert not np.array_equal(first.kinds, other.kinds)
