"""Figures of README and docs are those of the files of results, and students that parity refused are in no table."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import pages_of_docs

from qkd.config.binding import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [README, *(path.read_text(encoding="utf-8") for path in pages_of_docs())]
TEXT = "\n".join(PAGES)
MOST_LINES = 200  # of the README: a newcomer reads no more


def load(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def tables() -> Any:
    return load("readme_tables")


@pytest.fixture(scope="module")
def accuracy() -> Any:
    return load("accuracy")


def test_the_readme_is_short_and_opens_with_the_picture_and_its_table(tables: Any) -> None:
    assert len(README.splitlines()) <= MOST_LINES and len(PAGES) > 10
    assert README.index("docs/tradeoff.svg") < README.index("\n".join(tables.front_rows())) < README.index("## Install")


@pytest.mark.parametrize(
    "part",
    ["front_rows", "latency_rows", "runtime_rows", "accuracy_rows", "ladder_rows", "step_size_rows", "size_rows"],
)
def test_the_tables_are_rendered_from_the_files(tables: Any, part: str) -> None:
    rows = getattr(tables, part)()
    assert len(rows) >= 4 and "\n".join(rows) in TEXT


def test_the_single_figures_are_those_of_the_files(tables: Any) -> None:
    words = " ".join(TEXT.split())
    missing = {name: text for name, text in tables.figures().items() if " ".join(text.split()) not in words}
    assert missing == {}


def test_the_readmes_own_sentences_are_held_too(tables: Any) -> None:
    """They stand on the page of results as well, so one of both alone could grow old."""
    words, found = " ".join(README.split()), tables.figures()
    names = ("low-bit", "low-bit with AMX", "low-bit on Arm", "sizes")
    assert all(" ".join(found[name].split()) in words for name in names)


def test_no_method_beats_the_labels_by_more_than_the_readme_says() -> None:
    results = ROOT / "benchmarks" / "results"
    gains = []
    methods = json.loads((results / "methods.json").read_text())["table"]
    labels = {row["bits"]: row["mean"] for row in methods if row["method"] == "plain"}
    gains += [row["mean"] - labels[row["bits"]] for row in methods]
    recipes = {row["option"]: row["mean"] for row in json.loads((results / "recipes.json").read_text())["table"]}
    gains += [recipes[name] - recipes["labels_only"] for name in ("baseline", "self_distillation", "soft_targets_only")]
    fashion = json.loads((results / "accuracy_fashion_mnist.json").read_text())["summary"]
    taught, alone = (fashion[f"configs/fashion-mnist/{name}.yaml"]["mean"] for name in ("w2a2", "w2a2-plain"))
    gains.append(taught - alone)
    (said,) = re.findall(r"labels alone by more than ([\d.]+) points", README)
    assert 0 < 100 * max(gains) <= float(said) < 100 * max(gains) + 0.05


def test_every_file_of_results_that_a_page_names_is_there() -> None:
    names = set(re.findall(r"`(?:benchmarks/results/)?([a-z0-9_]+\.(?:json|md))`", TEXT))
    known = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    assert {"export_latency_vnni.json", "methods.md"} <= names & known
    of_runs_and_data = {"parity.json", "report.md", "layers.json", "classes.json", "data.json", "preprocess.json",
                        "arithmetic.json"}  # fmt: skip
    assert names & {name for name in names if "/" not in name} - known <= of_runs_and_data


def make_run(folder: Path, *, passed: bool, is_complete: bool, words: Sequence[str] = ()) -> Path:
    files = {
        "teacher/result.json": {"test_accuracy": 0.9},
        "student/result.json": {"test_accuracy": 0.8, "weight_bits": 4, "act_bits": 4},
        "export/parity.json": {
            "passed": passed, "faults": [] if passed else ["codes of 1 of 2 quantizers differ"], "images": 10,
            "off": {"top1_agreement": 1.0, "differing": 0}, "on": {"top1_agreement": 1.0}, "layers": [],
        },
        "export/student.onnx": 1, "export/teacher.onnx": 1,
    }  # fmt: skip
    if is_complete:
        files["manifests/export.json"] = {}
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    config = load_config(ROOT / "configs/digits/w4a4.yaml", [f"seed={folder.name[-1]}", *words])
    (folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    return folder


def test_collect_takes_no_run_that_parity_refused(accuracy: Any, tmp_path: Path) -> None:
    config = str(ROOT / "configs/digits/w4a4.yaml")
    make_run(tmp_path / "digits-w4a4-seed0", passed=True, is_complete=True)
    make_run(tmp_path / "digits-w4a4-seed1", passed=False, is_complete=False)
    make_run(tmp_path / "digits-w4a4-seed2", passed=True, is_complete=False)
    rows = [accuracy.collect(config, seed, tmp_path) for seed in range(4)]
    assert rows[0]["student_accuracy"] == 0.8 and rows[0]["passed"] is True
    assert [row.get("failed") for row in rows[1:]] == [
        "export: parity refused the file: codes of 1 of 2 quantizers differ", "export: not complete",
        "not run to its end",
    ]  # fmt: skip
    assert accuracy.summarize(rows, [config])[config]["seeds"] == 1


def test_collect_takes_no_run_of_other_settings(accuracy: Any, tmp_path: Path) -> None:
    config = str(ROOT / "configs/digits/w4a4.yaml")
    make_run(tmp_path / "digits-w4a4-seed0", passed=True, is_complete=True, words=["data.train_limit=256"])
    assert "failed" not in accuracy.collect(config, 0, tmp_path, ["data.train_limit=256"], has_own_teacher=True)
    other = accuracy.collect(config, 0, tmp_path, ["data.train_limit=512"])
    assert other["failed"] == "trained with other settings: data.train_limit was 256, now 512"
    words = ["data.train_limit=256", "teacher.train.lr=0.5"]
    assert "teacher.train.lr was" in accuracy.collect(config, 0, tmp_path, words, has_own_teacher=True)["failed"]
    assert "failed" not in accuracy.collect(config, 0, tmp_path, words), "it takes the first config's teacher"


def test_an_environment_is_that_of_the_runs(tmp_path: Path) -> None:
    stage_runs = load("stage_runs")
    for name, version in (("a", "2.13.0"), ("b", "2.14.1")):
        (tmp_path / name).mkdir()
        packages = {"torch": version, "brevitas": "0.1"}
        record = {"commit": name, "cpu": "another", "packages": packages}
        (tmp_path / name / "environment.json").write_text(json.dumps(record))
    found = stage_runs.environment_of(stage_runs.runs_in(tmp_path))
    assert found["commit"] == ["a", "b"] and found["torch"] == "2.13.0 / 2.14.1" and found["brevitas"] == "0.1"
    assert found["cpu"] == "another" and found["cpu_flags"] is None
    with pytest.raises(SystemExit):
        stage_runs.require_runs(argparse.ArgumentParser(), tmp_path / "a")


def test_a_table_of_an_earlier_version_is_judged(accuracy: Any, tmp_path: Path) -> None:
    good = {"config": "c", "seed": 0, "teacher_accuracy": 0.9, "student_accuracy": 0.8, "images": 10_000,
            "parity_off": 1.0, "integers_differing_off": 0}  # fmt: skip
    rows = [good, {**good, "seed": 1, "parity_off": 0.9999}, {**good, "seed": 2, "integers_differing_off": 3},
            {**good, "seed": 3, "passed": False}]  # fmt: skip
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"configs": ["c"], "rows": rows}))
    accuracy.judge(path)
    found = json.loads(path.read_text())
    assert found["rows"][0] == good and all("failed" in row for row in found["rows"][1:])
    assert [row["failed"].removeprefix("export: parity refused the file: ") for row in found["rows"][1:]] == [
        "another class on 1 of 10000 images, optimizations off",
        "3 codes differ, optimizations off",
        "parity.json says why",
    ]
    assert found["summary"]["c"]["seeds"] == 1
    before = path.read_text()
    accuracy.judge(path)
    assert path.read_text() == before


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/results/accuracy_*.json")), ids=lambda path: path.name)
def test_every_student_in_a_table_of_accuracies_equals_its_file(path: Path) -> None:
    rows = [row for row in json.loads(path.read_text())["rows"] if "failed" not in row]
    assert rows and all(row["parity_off"] == row["parity_on"] == 1.0 for row in rows)
    assert all(row["integers_differing_off"] == 0 for row in rows)
