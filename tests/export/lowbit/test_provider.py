"""Nets with the provider give what they give without it, bit for bit."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Session = Callable[..., Any]
Claimed = Callable[[], list[list[str]]]
Nets = Callable[[int], tuple[bytes, tuple[int, int]]]


def images(seed: int, batch: int, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    smooth = rng.random((batch, 3, *size), np.float32) * rng.random((batch, 3, 1, 1), np.float32)
    return smooth.astype(np.float32)


def check_nets(seeds: range, random_net: Nets, make_session: Session, claimed: Claimed) -> int:
    lut_nets = 0
    for seed in seeds:
        model, size = random_net(seed)
        plain, ours = make_session(model, provider=False), make_session(model, provider=True)
        for batch in (1, 3):
            x = {"images": images(seed, batch, size)}
            for a, b in zip(plain.run(None, x), ours.run(None, x), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"net {seed}, batch {batch}")
        assert any(np.unique(y).size > 4 for y in plain.run(None, x)), f"net {seed} is saturated: it would prove nothing"
        del ours
        gc.collect()
        lut_nets += any("lut_conv" in region for region in claimed())
    return lut_nets


def test_random_nets_are_identical(random_net: Nets, make_session: Session, claimed: Claimed) -> None:
    assert check_nets(range(24), random_net, make_session, claimed) >= 20


@pytest.mark.slow
def test_many_random_nets_are_identical(random_net: Nets, make_session: Session, claimed: Claimed) -> None:
    assert check_nets(range(100, 320), random_net, make_session, claimed) >= 200
