"""Figures of data-free students and of drawn classes, wherever a page or a config quotes them, are those measured."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "methods" / "without_images.md").read_text(encoding="utf-8")
KEYS = ("float", "w4a4", "w2a2")
LARGE = "data_free_digits-32x32"  # of the configs; not measured to the end yet where the file is missing
LONG = "data_free_digits-32x32_long"  # of those with longer trainings
PROCEDURAL = "data_free_digits-32x32_procedural"  # of those without a generator
STATISTICS = "data_free_resnet8"  # of methods that read batch norm's statistics
OTHER_NET = "data_free_digits_resnet20"  # from ResNet-20 to ResNet-8
FASHION = "data_free_fashion-mnist"  # of the configs of that set
FASHION_OTHER = "data_free_fashion-mnist_resnet8"  # the same teachers' students of another net
QUOTED = {  # row of the page -> file and method
    "real images": ("data_free", "real"),
    "images of noise": ("data_free", "noise"),
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


@pytest.mark.parametrize("name", ["data_free", "data_free_statistics", STATISTICS, OTHER_NET, FASHION, FASHION_OTHER])
def test_the_table_is_made_from_the_measurements(data_free: ModuleType, name: str) -> None:
    assert data_free.table(list(read(name).values())) == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize("label", QUOTED)
def test_the_page_quotes_what_was_measured(label: str) -> None:
    name, method = QUOTED[label]
    ((words),) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", PAGE, re.MULTILINE)
    cells = [cell.strip().replace("not run", "") for cell in words.split("|")]
    assert cells == [percent(read(name)[method], key) for key in KEYS]


@pytest.mark.parametrize(
    ("folder", "tables"), [("digits", (LONG, LARGE, PROCEDURAL, OTHER_NET)), ("fashion-mnist", (FASHION,))]
)
def test_configs_expect_what_was_measured(folder: str, tables: tuple[str, ...]) -> None:
    """Each config with the table of its own data set; LeNet-5 at 8x8 (``data_free``) is no config any more."""
    rows = {name: row for table in tables if (RESULTS / f"{table}.json").is_file() for name, row in read(table).items()}
    for path in sorted((ROOT / "configs" / folder / "data-free").glob("*.yaml")):
        (said,) = re.findall("^# Expected: (.*)$", path.read_text(), re.MULTILINE)
        figures = [percent(rows[path.stem], key) for key in KEYS if percent(rows[path.stem], key)] if (
            path.stem in rows
        ) else []  # fmt: skip
        assert re.findall(r"\d+\.\d %", said) == figures, path.stem
        assert figures or said == "not yet run", path.stem


@pytest.mark.parametrize("name", [LARGE, LONG, PROCEDURAL, STATISTICS, OTHER_NET, FASHION, FASHION_OTHER])
def test_the_page_has_the_whole_table_of_the_configs(name: str) -> None:
    if (RESULTS / f"{name}.md").is_file():
        assert (RESULTS / f"{name}.md").read_text() in PAGE
    else:
        assert "not yet run to the end" in PAGE


def test_the_page_tells_what_settings_were_chosen_by() -> None:
    """Accuracies on training images, in percent with one digit, a line of the page for each run."""
    rows = json.loads((RESULTS / "data_free_choice.json").read_text())["rows"]
    for row in rows:
        cells = [f"{100 * row[key]:.1f} %" if key in row else "-" for key in ("float", "low_bit")]
        cells.append(f"{100 * row['recall'][1]:.1f} %")
        assert f"| {' | '.join(cells)} |" in PAGE, row["run"]
    assert len(rows) > 5


def comparison(
    data_free: ModuleType, folder: Path, *methods: str, overrides: tuple[str, ...] = (), reuse: Path | None = None
) -> Any:
    options = {"configs": data_free.CONFIGS, "methods": list(methods), "seeds": [0, 1], "overrides": list(overrides)}
    return data_free.Comparison(Namespace(runs_dir=folder, reuse=reuse, **options))


def finish(folder: Path, accuracy: float, commit: str) -> None:
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "result.json").write_text(json.dumps({"test_accuracy": accuracy}))
    (folder / "environment.json").write_text(json.dumps({"commit": commit}))


def test_real_images_get_as_many_steps_as_made_ones(data_free: ModuleType, tmp_path: Path) -> None:
    """1,438 images are 22 batches of 64; an epoch of 6,400 made ones is 100."""
    for overrides in ((), ("student.train.epochs=6",)):
        made = comparison(data_free, tmp_path, "real", overrides=overrides)
        words = dict(word.split("=") for word in made.words("real", 2, 0))  # of a key given twice the last one counts
        for part in ("train", "float_train"):
            steps = 22 * int(words[f"student.{part}.epochs"])
            assert abs(steps - 100 * getattr(made.settings.student, part).epochs) <= 11, part


def test_a_table_shows_spread_missing_seeds_failures_and_the_commits_of_its_runs(
    data_free: ModuleType, tmp_path: Path
) -> None:
    for seed, accuracy in enumerate((0.5, 0.6)):
        finish(tmp_path / data_free.run_name("noise", 2, seed), accuracy, "abc")
    finish(tmp_path / data_free.run_name("dafl", 2, 0), 0.75, "abd")
    (tmp_path / "dafl-w2a2-seed1.failed").write_text("generator: loss is nan\n")
    made = comparison(data_free, tmp_path, "noise", "dafl")
    made.write(tmp_path / "table")
    noise, dafl, _, failed = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert noise == "| noise | - | - | - | 55.0 ± 7.1 % | - |"
    assert dafl == "| dafl | - | - | - | 75.0 % (1 of 2 seeds) | - |"
    assert failed == "- failed: dafl-w2a2-seed1: generator: loss is nan"
    facts = json.loads((tmp_path / "table.json").read_text())
    assert facts["data"] == "digits-32x32" and facts["environment"]["commit"] == ["abc", "abd"]


def test_methods_of_one_teacher_share_it_under_overrides_too(data_free: ModuleType, tmp_path: Path) -> None:
    made = comparison(data_free, tmp_path, "noise", "dafl", "gdfq")
    first = tmp_path / data_free.run_name("noise", 2, 0)
    (first / "manifests").mkdir(parents=True)
    (first / "manifests" / "teacher.json").write_text("{}")
    assert made.teacher("dafl", 0) == first and made.teacher("gdfq", 0) is None and made.teacher("dafl", 1) is None


def test_another_net_takes_teacher_and_images_from_the_runs_named(data_free: ModuleType, tmp_path: Path) -> None:
    made = comparison(data_free, tmp_path / "here", "noise", "dafl", reuse=tmp_path / "there")
    for method in ("noise", "dafl"):
        source = tmp_path / "there" / data_free.run_name(method, 2, 1)
        assert made.teacher(method, 1) == source
        assert f"teacher.run={source}" in made.words(method, 2, 1)
        own = tmp_path / "here" / data_free.run_name(method, 2, 1)
        assert f"teacher.run={own}" in made.words(method, 4, 1), "the float student is the first width's"


def test_a_run_that_is_resumed_keeps_the_teacher_it_began_with(data_free: ModuleType, tmp_path: Path) -> None:
    made = comparison(data_free, tmp_path, "noise", "dafl")
    for method, teacher in (("noise", None), ("dafl", tmp_path / "elsewhere")):
        run = tmp_path / data_free.run_name(method, 2, 0)
        (run / "manifests").mkdir(parents=True)
        (run / "manifests" / "teacher.json").write_text("{}")
        (run / "config.yaml").write_text(f"teacher: {{net: lenet5, run: {teacher or 'null'}}}\n")
        assert made.teacher(method, 0) == teacher


def test_drawn_classes_save_what_the_page_says() -> None:
    few, _, many = json.loads((RESULTS / "class_sampling.json").read_text())["rows"]
    words = " ".join(PAGE.split())
    assert (few["classes"], many["classes"], many["drawn"]) == (1000, 100_000, 1024)
    assert max(many["time_ratio"], many["memory_ratio"]) <= 0.2, "test_readme.py holds the sentence to the figures"
    assert "At 1,000 classes it does not pay" in words and few["time_ratio"] > 1 and few["memory_ratio"] > 1
    assert all(abs(one["z"]) < 3 for row in (few, many) for one in row["proposals"].values()), "without bias"
