"""The search space of population-based augmentation: 30 operations with a probability and a magnitude each."""

from __future__ import annotations

import random

from qkd.agents import PBA_OPERATIONS, Op, Policy
from qkd.agents.policies.policy import LEVELS

COPIES = 2  # each operation appears twice in a policy
TENTHS = 10  # probabilities are multiples of 1/10, 0 and 1 included
RESAMPLE_PROBABILITY = 0.2
LARGEST_STEP = 3


def start_policy() -> Policy:
    """Return the policy that every member starts with: all 60 integers are 0, so it does nothing.

    Returns:
        30 operations, each of probability 0 and magnitude 0.

    References:
        Zhou et al., `Role-Wise Data Augmentation for Knowledge Distillation <https://arxiv.org/abs/2004.08861>`_,
        2020; its published search logs start this way.
    """
    return Policy(tuple(Op(name, 0.0, 0) for _ in range(COPIES) for name in PBA_OPERATIONS))


def explore(policy: Policy, rng: random.Random) -> Policy:
    """Return a policy with every integer changed at random.

    Each of the integers (probability in tenths 0..10, magnitude 0..9) is redrawn uniformly with probability 0.2;
    otherwise 0, 1, 2 or 3 (uniformly) is added or subtracted, and the result is clipped to its range.

    Args:
        policy: Operations whose probabilities are multiples of 1/10.
        rng: The source of every draw.

    Returns:
        A policy of the same operations.

    References:
        Ho et al., `Population Based Augmentation <https://arxiv.org/abs/1905.05393>`_, 2019, algorithm 2.
    """
    return Policy(
        tuple(
            Op(op.name, _moved(tenths(op), TENTHS, rng) / TENTHS, _moved(op.magnitude, LEVELS - 1, rng))
            for op in policy.ops
        )
    )


def tenths(op: Op) -> int:
    """Return an operation's probability as the integer that a search changes, 0..10."""
    return round(op.probability * TENTHS)


def _moved(value: int, largest: int, rng: random.Random) -> int:
    if rng.random() < RESAMPLE_PROBABILITY:
        return rng.randint(0, largest)
    step = rng.randint(0, LARGEST_STEP)
    return min(largest, value + step) if rng.random() < 0.5 else max(0, value - step)
