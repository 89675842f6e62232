"""The ablation of recipes: every row is a config that binds, budgets are equal, and failed rows stay in the table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qkd.config.binding import bind
from qkd.run.folder import RunFolder

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


def test_the_page_says_what_was_measured(recipes: ModuleType) -> None:
    record = json.loads((BENCHMARKS / "results" / "recipes.json").read_text(encoding="utf-8"))
    page = " ".join((BENCHMARKS.parent / "docs" / "recipes.md").read_text(encoding="utf-8").split())
    assert record["table"] == recipes.summarize(record["rows"])
    assert (BENCHMARKS / "results" / "recipes.md").read_text(encoding="utf-8") == recipes.markdown(record)
    lines = {line["option"]: line for line in record["table"]}
    base = lines[recipes.BASELINE]
    teacher, mean, spread = (100 * value for value in (record["teacher"]["mean"], base["mean"], base["stdev"]))
    assert f"a teacher of {teacher:.1f} % and a baseline of {mean:.1f} ± {spread:.1f} %" in page
    away = {name: 100 * line["to_baseline"] for name, line in lines.items() if name != recipes.BASELINE}
    assert "Twelve of the fourteen" in page and [sum(abs(one) <= 0.5 for one in away.values()), len(away)] == [12, 14]
    found = {(row["option"], row["seed"]): row["accuracy"] for row in record["rows"]}
    signs = {name: {found[name, seed] > found[recipes.BASELINE, seed] for seed in record["seeds"]} for name in away}
    assert {name for name, sign in signs.items() if sign == {False}} == {
        "quantized_features", "soft_targets_only", "recipe",
    }  # fmt: skip
    assert {name for name, sign in signs.items() if sign == {True}} == {"decay_by_bits"}
    assert (
        f"quantized features by {-away['quantized_features']:.1f} points, soft targets without labels by "
        f"{-away['soft_targets_only']:.2f}, and the recipe, which uses the latter, by {-away['recipe']:.1f}." in page
    )
    assert f"a quarter of the weight decay at 2 bits, by {away['decay_by_bits']:.1f}." in page


def test_a_collected_run_of_other_settings_is_a_failed_row(recipes: ModuleType, tmp_path: Path) -> None:
    """Its figures would otherwise stand under a budget that it never had."""
    words = ["--data", str(tmp_path), "--net", "resnet8", "--runs-dir", str(tmp_path), "--epochs"]
    ablation = recipes.Ablation(recipes.parser().parse_args([*words, "7"]))
    with RunFolder.open(ablation._config(ablation._values("ema"), "ema-seed0", 0), runs_dir=tmp_path) as run:
        for role in ("teacher", "student"):
            run.folder(role)
            (run.path / role / "result.json").write_text('{"test_accuracy": 0.5, "seconds": 1}')
        (run.path / "student" / "metrics.jsonl").write_text('{"train_accuracy": 0.5}')
    assert ablation.result(("ema", 0), None)["accuracy"] == 0.5
    other = recipes.Ablation(recipes.parser().parse_args([*words, "6"]))
    assert "student.train.epochs was 7, now 6" in other.result(("ema", 0), None)["failed"]


def test_a_collected_table_keeps_the_messages_of_failed_runs(recipes: ModuleType, tmp_path: Path) -> None:
    ablation = recipes.Ablation(recipes.parser().parse_args(["--data", str(tmp_path), "--runs-dir", str(tmp_path)]))
    why = ablation.run(("ema", 0))  # there are no images
    assert why and ablation.result(("ema", 0), None)["failed"] == why
    assert "not run" in ablation.result(("ema", 1), None)["failed"]
    sys.modules["stage_runs"].note_outcome(tmp_path, "ema-seed0", "")
    assert "not run" in ablation.result(("ema", 0), None)["failed"]
