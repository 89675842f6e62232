"""The ablation of recipes: every row is a config that binds, budgets are equal, and failed rows stay in the table."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qkd.config.binding import bind

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def recipes() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_recipes", BENCHMARKS / "recipes.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_every_row_binds_with_the_same_number_of_epochs(recipes: ModuleType, tmp_path: Path) -> None:
    args = recipes.parser().parse_args(["--data", str(tmp_path), "--epochs", "7", "--net", "resnet8"])
    ablation = recipes.Ablation(args)
    assert set(args.options) == set(ablation.rows) and recipes.BASELINE in ablation.rows
    for name, changes in ablation.rows.items():
        values = {**ablation.base, "name": "one", "student": recipes.merged(ablation.base["student"], changes)}
        student = bind(values).student
        before = sum(width.epochs for width in student.widths)
        before += student.auxiliary.train.epochs if student.auxiliary is not None else 0
        assert student.train.epochs + before == 7, name
        assert student.quant.weight_bits == 2 and student.train.lr == args.lr
    assert len({str(changes) for changes in ablation.rows.values()}) == len(ablation.rows)


def test_a_failed_row_stays_and_differences_are_paired(recipes: ModuleType) -> None:
    rows = [
        {"option": "baseline", "seed": 0, "accuracy": 0.8}, {"option": "baseline", "seed": 1, "accuracy": 0.6},
        {"option": "stats", "seed": 0, "accuracy": 0.81}, {"option": "stats", "seed": 1, "accuracy": 0.63},
        {"option": "ema", "seed": 0, "failed": "ValueError: no"},
        {"option": "ema", "seed": 1, "failed": recipes.NOT_RUN},
    ]  # fmt: skip
    table = recipes.summarize(rows)
    assert [line["option"] for line in table] == ["stats", "baseline", "ema"]
    assert table[0]["to_baseline"] == pytest.approx(0.02) and table[0]["mean"] == pytest.approx(0.72)
    assert table[2]["seeds"] == 0 and table[2]["failures"] == ["ValueError: no", recipes.NOT_RUN]
    record = {
        "what": "w", "budget": "b", "seeds": [0, 1], "teacher": {"seeds": 0}, "table": table,
        "environment": {"cpu": "c", "cores": 1, "torch": "t", "brevitas": "b", "date": "d"},
    }  # fmt: skip
    text = recipes.markdown(record)
    assert "| stats | 72.00 ± 12.73 % | +2.00 ± 1.41 |" in text
    assert "| ema | none (1 failed: ValueError: no) (1 of the seeds not run) |  |" in text
