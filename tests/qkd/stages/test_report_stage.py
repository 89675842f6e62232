"""The report stage: what it reads from a run's files, and how agents become drawings."""

from __future__ import annotations

from pathlib import Path

import pytest

from qkd.agents import Op, Policy, Schedule
from qkd.config import AgentConfig
from qkd.report.records import read_metrics
from qkd.stages.report import draw_agent, strengths


def test_strength_is_probability_times_magnitude() -> None:
    first = Policy((Op("Rotate", 0.5, 9), Op("Rotate", 1.0, 1), Op("Invert", 1.0, 9)))
    schedule = Schedule(((2, first), (1, Policy()), (1, Policy((Op("Rotate", 1.0, 9),)))))
    assert strengths(schedule) == {"Invert": [1.0, 1.0, 0.0, 0.0], "Rotate": [0.5, 0.5, 0.0, 1.0]}


@pytest.mark.parametrize(
    ("agent", "rows"),
    [
        (AgentConfig(policy="none"), {}),
        (AgentConfig(policy="crop", crop_padding=2), {"crop, padding 2": [1.0, 1.0]}),
        (AgentConfig(policy="crop_flip"), {"crop, padding 4": [1.0, 1.0], "flip": [0.5, 0.5]}),
        (AgentConfig(policy="trivial", flip=False, crop_padding=0, cutout=3),
         {"1 drawn operation": [0.5, 0.5], "cut-out 3": [1.0, 1.0]}),
        (AgentConfig(policy="randaugment", magnitude=15, operations=3, crop_padding=0),
         {"3 drawn operations": [0.5, 0.5], "flip": [0.5, 0.5]}),
    ],
)  # fmt: skip
def test_an_agent_without_schedule_is_drawn_too(agent: AgentConfig, rows: dict[str, list[float]]) -> None:
    assert draw_agent(agent, 2, None) == rows


def test_a_schedule_comes_before_crop_and_flip(tmp_path: Path) -> None:
    agent = AgentConfig(policy="file", schedule=tmp_path / "x.yaml")
    rows = draw_agent(agent, 1, Schedule(((1, Policy((Op("Solarize", 1.0, 0),))),)))
    assert rows == {"Solarize": [0.1], "crop, padding 4": [1.0], "flip": [0.5]}


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"epoch": 1}\n{"epoch"')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        read_metrics(file)
    file.write_text('{"epoch": 1}\n')
    assert read_metrics(file) == [{"epoch": 1}]
