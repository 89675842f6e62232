"""The page on federated training quotes what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def federated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import federated

    return federated


def test_the_table_is_made_from_the_measurements_and_is_on_the_page(federated: ModuleType) -> None:
    rows = json.loads((RESULTS / "federated.json").read_text())["rows"]
    table = (RESULTS / "federated.md").read_text()
    assert federated.table(rows) == table and len(rows) == 9
    assert f"<!-- table -->\n{table}<!-- end -->" in (ROOT / "docs" / "federated.md").read_text()


def test_rows_have_all_rounds_and_rising_bytes() -> None:
    for row in json.loads((RESULTS / "federated.json").read_text())["rows"]:
        points = row["curve"]
        assert points and not row["failed"]
        for before, after in zip(points, points[1:], strict=False):
            assert before["bytes_up"] < after["bytes_up"] and before["bytes_down"] < after["bytes_down"]
