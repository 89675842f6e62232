"""Named streams: stable, distinct, and without an effect on global state."""

from __future__ import annotations

import torch

from qkd.seeding import derive, global_stream, stream


def draw(*names: str | int, seed: int = 0) -> list[float]:
    return torch.rand(3, generator=stream(seed, *names)).tolist()


def test_streams_never_change() -> None:
    assert derive(0, "augment", 3, 7) == 6030580639932560816  # a change would break every checkpoint


def test_equal_names_give_equal_numbers_and_others_do_not() -> None:
    assert draw("augment", 1, 2) == draw("augment", 1, 2)
    others = [("augment", 2, 1), ("augment", "1", 2), ("augment", 12), ("order", 1, 2), ("augment",)]
    assert all(draw(*names) != draw("augment", 1, 2) for names in others)
    assert draw("augment", 1, 2, seed=1) != draw("augment", 1, 2)


def test_seeds_fit_and_differ() -> None:
    seeds = {derive(0, "augment", epoch, step) for epoch in range(20) for step in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_global_stream_restores_the_global_generator() -> None:
    before = torch.get_rng_state()
    with global_stream(0, "init"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    with global_stream(0, "init"):
        assert torch.equal(torch.rand(3), first)
