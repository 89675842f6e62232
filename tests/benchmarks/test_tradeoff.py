"""The README's picture shows the rows of its file of results, and the students in it pay off as the README says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "tradeoff.json").read_text())


@pytest.fixture(scope="module")
def tradeoff() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return __import__("tradeoff")
    finally:
        sys.path.pop(0)


def shown(rows: dict[str, Any]) -> list[str]:
    return [text for name, row in rows.items() for text in (name, f"{row['median_ms']:.2f} ms")]


def test_the_picture_in_the_docs_is_that_of_the_file() -> None:
    picture = (ROOT / "docs" / "tradeoff.svg").read_text(encoding="utf-8")
    assert len(FOUND["rows"]) >= 4 and [text for text in shown(FOUND["rows"]) if text not in picture] == []


def test_a_drawing_shows_every_row(tradeoff: Any, tmp_path: Path) -> None:
    rows = {name: {**row, "median_ms": 3.14 * row["median_ms"]} for name, row in FOUND["rows"].items()}
    tradeoff.draw({**FOUND, "rows": rows}, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert [text for text in shown(rows) if text not in picture] == []
    tradeoff.draw({**FOUND, "rows": rows}, tmp_path / "b.svg")
    assert (tmp_path / "b.svg").read_text(encoding="utf-8") == picture, "the same rows make the same file"


def test_with_the_provider_two_bits_are_smaller_and_faster_than_float_and_int8(tradeoff: Any) -> None:
    rows = FOUND["rows"]
    best = rows["W2A2, low-bit provider"]
    for name in (tradeoff.FP32, tradeoff.INT8):
        assert best["bytes"] < rows[name]["bytes"] and best["median_ms"] < rows[name]["median_ms"]
    assert best["accuracy"] == rows["W2A2"]["accuracy"]
