"""Figures of data-free students and of drawn classes, wherever a page or a config quotes them, are those measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
KEYS = ("float", "w4a4", "w2a2")
QUOTED = {  # row of the README -> file and method
    "real images": ("data_free", "real"),
    "noise": ("data_free", "noise"),
    "RDSKD": ("data_free", "rdskd"),
    "DAFL": ("data_free", "dafl"),
    "ResNet-8 -> ResNet-8, statistics frozen, noise": ("data_free_statistics", "noise"),
    "the same, GDFQ": ("data_free_statistics", "gdfq"),
}


@pytest.fixture
def data_free(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import data_free

    return data_free


def read(name: str) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]}


def percent(row: dict[str, Any], key: str) -> str:
    return f"{100 * row[key]['mean']:.1f} %" if row[key]["seeds"] else ""


@pytest.mark.parametrize("name", ["data_free", "data_free_statistics"])
def test_the_table_is_made_from_the_measurements(data_free: ModuleType, name: str) -> None:
    assert data_free.table(list(read(name).values())) == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("label", QUOTED)
def test_the_readme_quotes_what_was_measured(label: str) -> None:
    name, method = QUOTED[label]
    ((words),) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", README, re.MULTILINE)
    cells = [cell.strip().replace("not run", "") for cell in words.split("|")]
    assert cells == [percent(read(name)[method], key) for key in KEYS]


def test_configs_expect_what_was_measured(data_free: ModuleType) -> None:
    rows = read("data_free")
    for path in sorted(data_free.CONFIGS.glob("*.yaml")):
        (said,) = re.findall("^# Expected: (.*)$", path.read_text(), re.MULTILINE)
        figures = [percent(rows[path.stem], key) for key in KEYS if percent(rows[path.stem], key)] if (
            path.stem in rows
        ) else []  # fmt: skip
        assert re.findall(r"\d+\.\d %", said) == figures, path.stem
        assert figures or said == "not yet run", path.stem


def test_drawn_classes_save_what_the_readme_says() -> None:
    few, _, many = json.loads((RESULTS / "class_sampling.json").read_text())["rows"]
    words = " ".join(README.split())
    assert (few["classes"], many["classes"], many["drawn"]) == (1000, 100_000, 1024)
    assert max(many["time_ratio"], many["memory_ratio"]) <= 0.2, "test_readme.py holds the sentence to the figures"
    assert "At 1,000 classes it does not pay" in words and few["time_ratio"] > 1 and few["memory_ratio"] > 1
    assert all(abs(one["z"]) < 3 for row in (few, many) for one in row["proposals"].values()), "without bias"
