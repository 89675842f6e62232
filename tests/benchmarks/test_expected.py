"""What the configs of the methods promise is what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUND = json.loads((ROOT / "benchmarks" / "results" / "expected_methods.json").read_text())
CONFIGS = sorted((ROOT / "configs" / "digits" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_expected_accuracies_are_those_of_the_file(path: Path) -> None:
    figures = FOUND["configs"][str(path.relative_to(ROOT))]
    head = path.read_text().split("\nname:")[0]
    (said,) = re.findall(r"^# Expected: (.*?)^# Time:", head, re.MULTILINE | re.DOTALL)
    said, where = said.split("(seed 0; 359 test images; ")
    assert [float(one) for one in re.findall(r"student (\S+) %", said)] == [figures["student"]]
    taught = figures.get("student/teacher", figures["teacher"]), figures["teacher"]
    assert all(float(one) in taught for one in re.findall(r"teacher (\S+) %", said))
    accuracies = {float(one) for one in re.findall(r"\b\d\d\.\d\b", said)}
    assert accuracies <= set(figures.values())
    assert where.strip() == f"Intel Xeon, torch {FOUND['environment']['torch']})"
    assert "Intel" in FOUND["environment"]["cpu"] and FOUND["environment"]["commit"]
