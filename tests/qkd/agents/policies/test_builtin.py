"""The built-in schedule: every operation, stronger with time, and written by the search stage like any other."""

from __future__ import annotations

from pathlib import Path

from qkd.agents import PBA_OPERATIONS, build_agent, load_schedule, save_schedule
from qkd.agents.policies.builtin import pba_schedule
from qkd.config import AgentConfig


def test_every_operation_gets_stronger() -> None:
    thirds = [segment.policy.ops for segment in pba_schedule().segments]
    assert [tuple(op.name for op in ops) for ops in thirds] == [PBA_OPERATIONS] * 3
    for earlier, later in zip(thirds, thirds[1:], strict=False):
        assert all(
            a.probability < b.probability and a.magnitude < b.magnitude for a, b in zip(earlier, later, strict=True)
        )


def test_it_is_stretched_to_the_training_and_survives_its_file(tmp_path: Path) -> None:
    schedule = build_agent(AgentConfig(policy="pba"), epochs=8, mean=(0.5,)).schedule(8)
    assert schedule is not None and [segment.epochs for segment in schedule.segments] == [2, 2, 4]
    save_schedule(schedule, tmp_path / "s.yaml", role="student")
    assert load_schedule(tmp_path / "s.yaml") == schedule
