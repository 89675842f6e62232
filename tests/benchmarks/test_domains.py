"""Figures of students on domains are those measured, wherever they are quoted; a run that fails stays in the table."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qkd.config.binding import bind

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "domains.json"
PAGE = (ROOT / "docs" / "domains.md").read_text(encoding="utf-8")


@pytest.fixture
def domains(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import domains

    return domains


def test_every_run_has_a_config_that_can_be_bound(domains: ModuleType) -> None:
    runs = [run for part in domains.PARTS for run in domains.runs_of(part, [0, 1])]
    assert len({run.name for run in runs}) == len(runs) == 2 * (2 * 2 + 4 * 2)
    for run in runs:
        config = bind({**domains.values_of(run), "name": run.name})
        assert config.data.unseen_domain == run.unseen
        assert (config.student.adaptation is not None) == (run.method == "adaptation")
        assert (config.student.terms[1].loss == "filtered_soft_target") == (run.method == "confident")


def row(method: str, seed: int, unseen: str = "turned_0", **found: Any) -> dict[str, Any]:
    return {"part": "filter", "method": method, "unseen": unseen, "bits": 2, "seed": seed, **found}


def test_the_table_has_paired_differences_and_what_failed(domains: ModuleType) -> None:
    rows = [
        row("soft_target", 0, accuracy=0.5), row("confident", 0, accuracy=0.52),
        row("soft_target", 1, accuracy=0.6), row("confident", 1, accuracy=0.64),
        row("soft_target", 2, failed="Error: x"), row("confident", 2, accuracy=0.9),
    ]  # fmt: skip
    lines = domains.filter_table(rows)
    assert lines[2] == "| turned_0 | 55.0 ± 7.1 % (2) | 68.7 ± 19.4 % (3) | 1 |"
    assert lines[-1].endswith("|  | +3.00 ± 1.00 points | |"), "pairs of one seed alone"


def test_the_page_and_the_configs_quote_what_was_measured(domains: ModuleType) -> None:
    rows = json.loads(RESULTS.read_text())["rows"]
    assert not [one for one in rows if "failed" in one]
    text = domains.markdown(rows)
    assert text == RESULTS.with_suffix(".md").read_text()
    for table in text.strip().split("\n\n"):
        assert table in PAGE
    for part, method in (("adaptation", "adaptation"), ("filter", "confident")):
        file = domains.CONFIGS / ("adaptation.yaml" if part == "adaptation" else "filtered.yaml")
        (expected,) = re.findall(r"^# Expected: (.*)$", file.read_text(), re.MULTILINE)
        unseen = domains.config_of(part)["data"]["unseen_domain"]
        found = [
            one["accuracy"] for one in rows
            if (one["part"], one["method"], one["bits"], one["unseen"]) == (part, method, 2, unseen)
        ]  # fmt: skip
        mean, deviation, _ = re.findall(r"[\d.]+", domains.shown(found))
        assert f"W2A2 student {mean} ± {deviation} %" in expected


def test_a_collected_table_keeps_the_messages_of_failed_runs(domains: ModuleType, tmp_path: Path) -> None:
    args = argparse.Namespace(parts=["filter"], seeds=[0], runs_dir=tmp_path, overrides=["data.batch_size=none"])
    first = domains.Comparison(args).runs[0]
    domains.Comparison(args)._run(first)
    assert "batch_size" in domains.Comparison(args).row(first)["failed"]
    assert domains.Comparison(args).row(domains.Comparison(args).runs[1])["failed"] == "not run to its end"
