"""The page on fast students shows the tables of the result file, and the preset is what it measured."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantizers import QuantSpec

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RESULT: dict[str, Any] = json.loads((RESULTS / "fast_students.json").read_text())


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


def test_the_page_shows_the_table_of_the_other_images(fast_students: ModuleType) -> None:
    page = (ROOT / "docs" / "fast_students.md").read_text()
    found = json.loads((RESULTS / "fast_students_cifar10.json").read_text())["accuracy"]
    assert fast_students.accuracy_table(found) in page
    assert f"{found['teacher_accuracy']:.2%}".replace("%", " %") in page


def test_the_page_gives_the_range_of_each_change_with_other_kernels() -> None:
    page = " ".join((ROOT / "docs" / "fast_students.md").read_text().split())
    rows = json.loads((RESULTS / "fast_students_avx2.json").read_text())["latency"]["rows"]
    times = {(row["variant"], row["shape"]): (row["ms"], row["median_ms"]) for row in rows}
    for variant in ("sums of 4 bits", "sums of 2 bits", "first layer of 4 bits"):
        ratios = [
            ours / plain
            for (name, shape), measured in times.items()
            if name == variant
            for ours, plain in zip(measured, times["default", shape], strict=True)
        ]
        words = rf"{variant} (take )?{min(ratios):.2f} to {max(ratios):.2f}"
        assert len(ratios) == 4 and re.search(words, page), words


@pytest.mark.parametrize("part", ["latency", "accuracy"])
def test_a_file_with_one_part_has_one_table(
    fast_students: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    part: str,
) -> None:  # fmt: skip
    (tmp_path / "one.json").write_text(json.dumps({part: RESULT[part]}))
    monkeypatch.setattr(sys, "argv", ["fast_students.py", "tables", "--json", str(tmp_path / "one.json")])
    fast_students.main()
    assert capsys.readouterr().out == f"{getattr(fast_students, f'{part}_table')(RESULT[part])}\n"


def test_the_preset_is_the_variant_that_was_called_default(fast_students: ModuleType) -> None:
    assert QuantSpec.preset("fast") == QuantSpec(weight_bits=2, act_bits=2, **fast_students.VARIANTS["default"])


def test_every_seed_of_every_variant_has_a_result() -> None:
    rows = RESULT["accuracy"]["rows"]
    assert {row["seed"] for row in rows} == {0, 1, 2} and not [row for row in rows if "failed" in row]
