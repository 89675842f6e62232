"""The verdict, classes that are confused, pictures, and runs side by side."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from beside import load

from export.sample import Sample, write_sample
from qkd.cli import main
from qkd.files import DamagedFileError
from qkd.predicting.predictions import small
from qkd.report import RunRecord, render_page, render_text, summarize
from qkd.report.comparing.comparison import compare_runs, render_comparison
from qkd.report.findings.confusion import class_table, confusion_matrix, pair_table
from qkd.report.findings.gallery import read_gallery
from qkd.report.findings.verdict import verdict
from qkd.report.intervals import pack_answers, paired_difference, unpack_answers, unpaired_interval
from qkd.report.summary import ModelRow

files = load(Path(__file__).parents[1] / "run_files.py")
PREDICTIONS = {
    "images": 10,
    "classes": ["cat", files.EVIL, "newt"],
    "models": {
        "student": {"right": 6, "confusion": [[0, 0, 4], [1, 0, 3], [1, 1, 1], [2, 2, 1], [2, 1, 1]]},
        "teacher": {"right": 8, "confusion": [[0, 0, 4], [1, 0, 1], [1, 1, 3], [2, 2, 1], [2, 0, 1]]},
    },
    "difference": {"value": -0.2, "half_width": 0.25, "only_student": 0, "only_teacher": 2},
}


def row(size: int | None, ms: float | None, accuracy: float | None = 0.9, role: str = "teacher (= x)") -> ModelRow:
    return ModelRow(role, "y", test_accuracy=accuracy, size_bytes=size, median_ms=ms)


@pytest.mark.parametrize(
    ("student", "twin", "words"),
    [
        (row(100, 1.0), row(780, 2.1), "7.8 x smaller than FP32, 2.1 x faster, -2.0 accuracy points"),
        (row(100, 2.0), row(780, 1.9), "7.8 x smaller than FP32, 1.05 x slower, -2.0 accuracy points"),
        (row(100, 1.0), row(780, 1.01), "7.8 x smaller than FP32, as fast, -2.0 accuracy points"),
        (row(100, None), row(99, 1.0), "as large as FP32, -2.0 accuracy points"),
        (row(None, None), None, "-2.0 accuracy points"),
    ],
)
def test_the_verdict_says_all_in_a_sentence(student: ModelRow, twin: ModelRow | None, words: str) -> None:
    text = verdict(student, twin, row(1, 1.0, 0.92), predictions={}, parity={"passed": True})
    assert text == f"{words} vs. the teacher."


def test_the_verdict_says_what_another_provider_gains() -> None:
    under = {"low-bit provider": row(100, 1.0)}
    text = verdict(row(100, 2.2), row(780, 2.0), row(1, 1.0, 0.92), predictions={}, parity={}, under=under)
    assert text.startswith(
        "7.8 x smaller than FP32, 1.1 x slower, 2.0 x faster with the low-bit provider, -2.0 accuracy points"
    )


def test_the_verdict_has_a_spread_and_a_doubt_where_they_are_known() -> None:
    teacher = row(1, 1.0, 1.1)  # 20 points more, as in the predictions
    text = verdict(row(1, 1.0), row(1, 1.0), teacher, predictions=PREDICTIONS, parity={"passed": False})
    assert "-20.0 ± 25.0 accuracy points" in text and text.endswith("; but the file is NOT proven to be the student.")
    assert verdict(None, None, None, predictions={}, parity={}) == ""
    assert verdict(row(1, 1.0, None), None, None, predictions={}, parity={}) == ""


def test_a_paired_difference_is_that_of_the_formula() -> None:
    ours = np.array([True] * 80 + [False] * 20)
    theirs = np.array([True] * 70 + [False] * 10 + [True] * 18 + [False] * 2)
    found = paired_difference(ours, theirs)
    assert (found["only_student"], found["only_teacher"]) == (10, 18)
    assert found["value"] == pytest.approx(-0.08)
    assert found["half_width"] == pytest.approx(1.959964 * np.sqrt(29 - 64 / 102) / 102)
    assert paired_difference(ours, ours)["half_width"] == pytest.approx(1.959964 / 102), "equal here is not equal"


def test_few_images_that_differ_are_no_difference() -> None:
    """Four that only one net gets right: an exact test gives p = 0.125. Nets alike are told apart once in twenty."""
    ours = np.ones(359, bool)
    theirs = ours.copy()
    theirs[:4] = False
    found = paired_difference(ours, theirs)
    assert found["half_width"] > found["value"] == pytest.approx(4 / 359)
    draws = np.random.default_rng(0)
    claims = 0
    for _ in range(2000):
        differ = draws.random(359) < 0.02
        first = np.where(differ, draws.random(359) < 0.5, True)
        found = paired_difference(first, np.where(differ, ~first, True))
        claims += abs(found["value"]) > found["half_width"]
    assert claims / 2000 < 0.05


def test_a_spread_of_other_figures_is_left_out() -> None:
    """Predictions are those of exported files: an ensemble has none, and batch statistics give other accuracies."""
    ensemble = row(None, None, 0.95, "ensemble of 2 teachers")
    text = verdict(row(1, 1.0), None, ensemble, predictions={**PREDICTIONS, "images": 1000}, parity={})
    assert text == "-5.0 accuracy points vs. the ensemble of 2 teachers."


def test_answers_are_packed_and_read_back() -> None:
    answers = np.array([True, False, True] * 5)
    assert np.array_equal(unpack_answers(pack_answers(answers), 15), answers)
    assert [unpack_answers(text, 15) for text in ("b6", "nonsense", "b6dbff")] == [None] * 3


def test_an_unpaired_interval_is_newcombes() -> None:
    # Newcombe 1998, table II, method 10: 56/70 and 48/80, 0.0524 to 0.3339
    assert unpaired_interval(56 / 70, 48 / 80, (70, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def with_answers(path: Path, right: str, *, pixels: str = "p", median: float = 0.1234) -> Path:
    """Return a run of eight test images that has answers to each, and the other figures of ``make_run``."""
    files.make_run(path)
    bits = np.array([mark == "+" for mark in right])
    share = float(bits.mean())
    models = {name: {"right": int(bits.sum()), "correct": pack_answers(bits), "confusion": []}
              for name in ("student", "teacher")}  # fmt: skip
    record = {"images": len(bits), "classes": ["a"], "models": models, "difference": {"value": 0, "half_width": 0}}
    files.write(path / "export" / "predictions.json", record)
    student = {"role": "student", "net": "n", "test_accuracy": share, "weight_bits": 2, "act_bits": 2}
    files.write(path / "student" / "result.json", {**student, "test_images": len(bits)})
    test = {"images": len(bits), "labels": "l", "pixels": pixels, "sampled": 0}
    files.write(path / "data.json", {"classes": ["a"], "train": {}, "test": test, "fingerprint": "f"})
    bench = json.loads((path / "bench" / "local.json").read_text())
    row = {"median_ms": median, "p10_ms": 0.98 * median, "p90_ms": 1.02 * median}
    bench["models"] = {"student": row, "student, low-bit provider": {**row, "median_ms": 0.05}}
    files.write(path / "bench" / "local.json", bench)
    return path


def test_runs_are_compared_image_by_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = with_answers(tmp_path / "first", "+" * 60 + "-" * 20)
    better = with_answers(tmp_path / "better", "+" * 70 + "-" * 10, median=0.2)
    noise = with_answers(tmp_path / "noise", "-" * 2 + "+" * 60 + "-" * 18)
    other = with_answers(tmp_path / "other", "+" * 80, pixels="q")
    table = compare_runs([first, better, noise, other])
    accuracy = {one.run: one for one in table.differences if one.figure == "accuracy"}
    assert {run: one.verdict for run, one in accuracy.items()} == {
        "better": "better", "noise": "within noise", "other": "not comparable: other test images",
    }  # fmt: skip
    assert accuracy["better"].is_paired and accuracy["better"].difference == pytest.approx(0.125)
    half = 1.959964 * np.sqrt(11 - 100 / 82) / 82
    middle = 10 / 82
    assert accuracy["better"].interval == pytest.approx((middle - half, middle + half))
    assert accuracy["other"].difference is None and accuracy["other"].interval is None
    latency = {(one.run, one.figure): one.verdict for one in table.differences if one.figure.startswith("latency")}
    assert latency["better", "latency, local"] == "slower" and latency["noise", "latency, local"] == "within noise"
    assert latency["better", "latency, local, low-bit provider"] == "within noise"
    assert table.notes == ()
    for path in (first, better):
        files.write(path / "config.yaml", {})
    assert main(["compare", str(first), str(better), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "differences" not in rows[0] and rows[1]["differences"][0]["verdict"] == "better"


def test_accuracies_by_batch_statistics_are_not_compared_with_others(tmp_path: Path) -> None:
    """The exported files' answers use the running statistics, so that they do not belong to these accuracies."""
    paths = [with_answers(tmp_path / name, "+" * 60 + "-" * 20) for name in ("running", "batches", "more")]
    for path, accuracy in zip(paths[1:], (0.6, 0.65), strict=True):
        result = json.loads((path / "student" / "result.json").read_text())
        files.write(path / "student" / "result.json", {**result, "test_accuracy": accuracy, "batch_statistics": 20})
    mixed, alike = compare_runs(paths[:2]).differences[0], compare_runs(paths[1:]).differences[0]
    assert mixed.verdict == "not comparable: other statistics in batch norm (data.batch_statistics)"
    assert mixed.difference is None and mixed.interval is None
    assert alike.difference == pytest.approx(0.05) and not alike.is_paired
    assert alike.interval == pytest.approx(unpaired_interval(0.65, 0.6, (80, 80)))


def test_answers_of_another_student_are_not_paired(tmp_path: Path) -> None:
    paths = [with_answers(tmp_path / name, "+" * 60 + "-" * 20) for name in ("one", "two")]
    result = json.loads((paths[1] / "student" / "result.json").read_text())
    files.write(paths[1] / "student" / "result.json", {**result, "test_accuracy": 0.5})
    found = compare_runs(paths).differences[0]
    assert not found.is_paired and found.difference == pytest.approx(-0.25) and found.verdict == "worse"


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [with_answers(tmp_path / place / "run", "+" * 60 + "-" * 20) for place in ("a", "b")]
    for path in paths:
        files.write(path / "config.yaml", {})
    table = compare_runs(paths)
    assert [row.run for row in table.rows] == [str(path) for path in paths]
    assert table.differences[0].against == str(paths[0]) and table.differences[0].run == str(paths[1])
    for out in ("", str(tmp_path / "missing" / "x.html")):
        with pytest.raises(SystemExit):
            main(["compare", *map(str, paths), "--out", out])
        said = capsys.readouterr().err
        assert "must end in .html" in said or "in an existing folder" in said


@pytest.mark.parametrize("record", ["data.json", "student/result.json", "export/predictions.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", '{"classes": 1, "test": 2, "images": 3, "test_accuracy": "x"}'])
def test_a_damaged_run_gets_a_line_and_the_others_are_compared(tmp_path: Path, record: str, content: str) -> None:
    """One damaged ``data.json`` left all runs without a line."""
    paths = [with_answers(tmp_path / name, "+" * 60 + "-" * 20) for name in ("a", "b", "c")]
    (paths[1] / record).write_text(content)
    table = compare_runs(paths)
    assert [row.state.startswith("cannot be read") for row in table.rows] == [False, True, False]
    assert record.rpartition("/")[2] in table.rows[1].state
    assert {(one.against, one.run) for one in table.differences} == {("a", "c")}


def test_images_of_another_domain_are_other_images(tmp_path: Path) -> None:
    """The record of the set is taken before its images are turned, inverted or colored."""
    paths = [files.make_run(tmp_path / name) for name in ("upright", "turned")]
    test = {"images": 360, "labels": "l", "pixels": "p", "sampled": 0}
    for path, data in zip(paths, ({}, {"domains": {"a": {}, "b": {"rotate": 35}}, "unseen_domain": "b"}), strict=True):
        files.write(path / "data.json", {"classes": ["a"], "train": {}, "test": test, "fingerprint": "f"})
        files.write(path / "config.yaml", {"data": data})
    (one,) = [one for one in compare_runs(paths).differences if one.figure == "accuracy"]
    assert one.verdict == "not comparable: other test images" and one.difference is None


def test_a_paired_interval_stays_within_what_is_possible() -> None:
    for right in (1, 2, 5, 10):
        found = paired_difference(np.ones(right, bool), np.zeros(right, bool))
        assert found["value"] == 1 and -1 <= found["low"] < found["high"] <= 1


def test_what_a_comparison_lacks_is_said_with_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [files.make_run(tmp_path / name) for name in ("one", "two")]
    for path in paths:
        files.write(path / "config.yaml", {})
    assert main(["compare", *map(str, paths)]) == 0
    assert re.search(r"\+0\.0 points +- +unknown: no record of the test images", capsys.readouterr().out)
    for path in paths:
        test = {"images": 360, "labels": "l", "pixels": "p", "sampled": 0}
        files.write(path / "data.json", {"classes": ["a"], "train": {}, "test": test, "fingerprint": "f"})
    assert main(["compare", *map(str, paths)]) == 0
    text = capsys.readouterr().out
    assert "compared with one:" in text and re.search(r"-2\.7 \.\. \+2\.7 points +within noise", text)
    assert "note: accuracy of two: not compared image by image" in text
    assert f"`qkd bench {paths[0]} {paths[1]}` measures the files interleaved" in text
    images = np.zeros((2, 1, 4, 4), np.float32)
    for position, path in enumerate(paths):  # runs that prepare the images differently
        write_sample(path / "export" / "sample.npz", Sample(images + position))
    note = compare_runs(paths).notes[-1]
    assert note.startswith(f"`qkd bench {paths[0]}`, for each of the runs, measures the files, also with")
    page = "\n".join(files.Page(render_comparison(compare_runs(paths))).words)
    assert "Compared with one" in page and "within noise" in page and "qkd bench" in page
    assert main(["compare", str(paths[0])]) == 0
    assert "compared with" not in capsys.readouterr().out


def test_classes_come_worst_first() -> None:
    rows = class_table(PREDICTIONS, "teacher 1 of 2")
    assert rows[0][3] == "teacher 1 of 2"
    assert [line[0] for line in rows] == ["class", files.EVIL, "newt", "cat"]
    assert rows[1] == [files.EVIL, "4", "25.00 %", "75.00 %", "cat (3)"]
    assert rows[3] == ["cat", "4", "100.00 %", "100.00 %", "-"]
    assert pair_table(PREDICTIONS)[1:] == [[files.EVIL, "cat", "3"], ["newt", files.EVIL, "1"]]
    matrix = confusion_matrix(PREDICTIONS)
    assert [cell.images for cell in matrix[1][1]] == [3, 1, 0]
    assert matrix[1][1][0].share == 0.75 and matrix[1][1][1].is_right
    assert class_table({}) == [class_table(PREDICTIONS)[0]] and confusion_matrix({}) == []
    many = {**PREDICTIONS, "classes": [str(number) for number in range(21)]}
    assert confusion_matrix(many) == []


def make_findings(path: Path) -> Path:
    """Write a run with predictions and pictures."""
    run: Path = files.make_run(path)
    files.write(run / "export" / "predictions.json", PREDICTIONS)
    facts = json.loads((run / "export" / "export.json").read_text())
    facts["student"]["needs"] = "onnxruntime >= 1.24"
    files.write(run / "export" / "export.json", facts)
    files.write(run / "config.yaml", {})
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), np.uint8)
    buffer = io.BytesIO()
    np.savez(
        buffer, mistakes=images, samples=images, **{
            "mistakes.labels": np.array([0, 1, 9]), "mistakes.classes": np.array([1, 0, 0]),
            "mistakes.confidence": np.array([0.99, 0.9, 0.8]), "agent.student": np.stack([images, images]),
            "agent.student.epochs": np.array([0, 4]),
        },
    )  # fmt: skip
    (run / "export" / "gallery.npz").write_bytes(buffer.getvalue())
    return run


def page_of(run: Path) -> str:
    summary = summarize(run)
    record = files.record() if hasattr(files, "record") else RunRecord()
    gallery = read_gallery(run / "export" / "gallery.npz", PREDICTIONS["classes"])
    return render_page(summary, RunRecord(**{**record.__dict__, "gallery": gallery}))


def test_the_page_opens_with_a_verdict_and_shows_mistakes(tmp_path: Path) -> None:
    run = make_findings(tmp_path / "run")
    text = page_of(run)
    assert text.index('<p class="verdict">25.3 x smaller than FP32, 4.1 x faster, ') < text.index("<table")
    assert set(re.findall(r'src="([^,"]*)', text)) == {"data:image/png;base64"}, "no resource from elsewhere"
    assert not re.search(r"https?://|url\(|@import|href=|<script", text)
    page = files.Page(text)
    assert [tag for tag, _ in page.tags].count("img") == 3 + 3 * 3
    words = "\n".join(page.words)
    for part in (f"{files.EVIL}, 99.00 %", "shows cat", "shows 9", "epoch 5", "unchanged", "onnxruntime >= 1.24",
                 "Parity: the share of test images", "Confusion matrix of the student"):  # fmt: skip
        assert part in words
    markdown = render_text(summarize(run))
    assert "**25.3 x smaller than FP32" in markdown and "## Most often confused" in markdown
    assert "onnxruntime &gt;= 1.24" in markdown


def test_pictures_that_are_none_are_refused(tmp_path: Path) -> None:
    assert read_gallery(tmp_path / "none.npz", []).mistakes == ()
    (tmp_path / "a.npz").write_bytes(b"nonsense")
    np.savez(tmp_path / "b.npz", mistakes=np.zeros((1, 2, 2, 3), np.float32))
    np.savez(tmp_path / "c.npz", mistakes=np.zeros((1, 2, 2, 5), np.uint8), **{
        f"mistakes.{key}": np.zeros(1, int) for key in ("labels", "classes", "confidence")
    })  # fmt: skip
    for name in "abc":
        with pytest.raises(DamagedFileError, match="not the pictures of a run"):
            read_gallery(tmp_path / f"{name}.npz", [])


def test_large_images_are_scaled_down() -> None:
    import torch

    assert small(torch.zeros(2, 3, 400, 200, dtype=torch.uint8)).shape == (2, 96, 48, 3)
    assert small(torch.zeros(2, 1, 200, 200, dtype=torch.uint8)).shape == (2, 96, 96, 1)
    assert small(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 8, 8, 1)


def test_runs_are_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_findings(tmp_path / "first")
    files.make_run(tmp_path / "second", is_equal=False)
    files.write(tmp_path / "second" / "config.yaml", {})
    files.write(tmp_path / "begun" / "config.yaml", {})
    files.write(tmp_path / "broken" / "config.yaml", {})
    files.write(tmp_path / "broken" / "student" / "result.json", {"weight_bits": "two"})
    table = compare_runs([tmp_path / name for name in ("first", "second", "begun", "broken")])
    first, second, begun, broken = table.rows
    assert (first.student, first.accuracy, first.size_bytes) == ("w2a4", 0.97, 98_765)
    assert first.size_ratio == pytest.approx(2_500_000 / 98_765) and first.latency_ratio == pytest.approx(0.5 / 0.1234)
    assert (first.state, second.state, begun.state) == ("measured", "parity FAILED", "begun")
    assert broken.state.startswith("cannot be read: ")
    out = tmp_path / "runs.html"
    assert main(["ls", "runs", str(tmp_path), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "begun", "broken", "first", "second"]
    page = files.Page(out.read_text())
    assert {"first", "w2a4", "25.31"} <= set(page.words) and [tag for tag, _ in page.tags].count("svg") == 2
    assert main(["compare", "second", str(tmp_path / "first"), "--runs-dir", str(tmp_path), "--json"]) == 0
    assert [one["run"] for one in json.loads(capsys.readouterr().out)] == ["second", "first"]
    assert "<script" not in render_comparison(table)


@pytest.mark.parametrize("arguments", [["compare", "nowhere"], ["ls", "runs", "nowhere"], ["ls", "nets", "folder"]])
def test_what_is_no_run_is_said(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith("qkd: ")


def test_no_runs_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no runs\n"


def record_of(**changes: Any) -> dict[str, Any]:
    return {**PREDICTIONS, **changes}


@pytest.mark.parametrize(
    "changes", [{"images": 0}, {"difference": {"value": 2, "half_width": 0}}, {"models": {"student": {"right": 1}}},
                {"models": {"student": {"right": 1, "confusion": [[1, 2]]}}}],
)  # fmt: skip
def test_predictions_of_another_shape_are_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    files.write(tmp_path / "export" / "predictions.json", record_of(**changes))
    with pytest.raises(DamagedFileError, match=r"predictions\.json"):
        summarize(tmp_path)
