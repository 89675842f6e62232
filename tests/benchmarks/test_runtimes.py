"""The benchmark of runtimes: sessions take turns, and each row's ratio is to the float net."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")


@pytest.fixture
def runtimes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import runtimes

    yield runtimes
    sys.modules.pop("runtimes")


class Session:
    def __init__(self, name: str, seconds: float, log: list[str], clock: list[float]) -> None:
        self.name, self.seconds, self.log, self.clock = name, seconds, log, clock

    def run(self, names: list[str], feeds: Any) -> None:
        assert names == ["logits"] and feeds["images"].shape == (1, 3, 4, 4)
        self.log.append(self.name)
        self.clock[0] += self.seconds


@pytest.mark.parametrize(("clock", "function"), [("cpu", "process_time"), ("wall", "perf_counter")])
def test_sessions_take_turns(runtimes: ModuleType, monkeypatch: pytest.MonkeyPatch, clock: str, function: str) -> None:
    log: list[str] = []
    now = [0.0]
    monkeypatch.setattr(runtimes.time, function, lambda: now[0])
    sessions = {"fp32": Session("fp32", 0.004, log, now), "w4a4": Session("w4a4", 0.001, log, now)}
    rows = runtimes.timed(sessions, torch.zeros(2, 3, 4, 4), 5, clock)
    assert log == ["fp32", "w4a4"] * (5 + runtimes.WARMUP)
    assert [row["name"] for row in rows] == ["fp32", "w4a4"]
    assert [row["median_ms"] for row in rows] == pytest.approx([4, 1])
    for key in ("to_fp32", "least_to_fp32"):
        assert [row[key] for row in rows] == pytest.approx([1, 0.25])
