"""The schedule that comes with the toolkit: every PBA operation, more often and stronger as the training progresses."""

from __future__ import annotations

from qkd.agents.policies.policy import PBA_OPERATIONS, Op, Policy, Schedule, Segment

STRENGTHS = ((0.2, 1), (0.3, 3), (0.4, 5))  # probability and magnitude in each third of the training


def pba_schedule() -> Schedule:
    """Return the schedule: three segments of the same length.

    Its numbers were chosen, not searched: a mild start to compare a searched schedule with.
    """
    policies = (Policy(tuple(Op(name, chance, level) for name in PBA_OPERATIONS)) for chance, level in STRENGTHS)
    return Schedule(tuple(Segment(1, policy) for policy in policies))
