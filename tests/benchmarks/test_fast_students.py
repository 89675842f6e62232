"""The page on fast students shows the tables of the result file, and the preset is what it measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantizers import QuantSpec

ROOT = Path(__file__).resolve().parents[2]
RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "fast_students.json").read_text())


@pytest.fixture
def fast_students(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fast_students

    return fast_students


def test_the_page_shows_the_tables(fast_students: ModuleType) -> None:
    page = (ROOT / "docs" / "fast_students.md").read_text()
    assert fast_students.latency_table(RESULT["latency"]) in page
    assert fast_students.accuracy_table(RESULT["accuracy"]) in page
    assert f"{RESULT['accuracy']['teacher_accuracy']:.2%}".replace("%", " %") in page


def test_the_preset_is_the_variant_that_was_called_default(fast_students: ModuleType) -> None:
    assert QuantSpec.preset("fast") == QuantSpec(weight_bits=2, act_bits=2, **fast_students.VARIANTS["default"])


def test_every_seed_of_every_variant_has_a_result() -> None:
    rows = RESULT["accuracy"]["rows"]
    assert {row["seed"] for row in rows} == {0, 1, 2} and not [row for row in rows if "failed" in row]
