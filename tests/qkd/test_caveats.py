"""What limits a run's figures is said beside them, with the reason where it is known."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from qkd.report import RunRecord, render_page, render_text, summarize
from qkd.report.caveats import accuracy_caveats, float_layers, latency_caveats, parity_caveats, wilson
from qkd.report.table import plain_text


@pytest.mark.parametrize(
    ("fraction", "count", "ends"),
    [
        (0.0, 10, (0.0, 0.27753)),
        (1.0, 10, (0.72247, 1.0)),
        (0.5, 100, (0.40383, 0.59617)),
        (0.9, 200, (0.85059, 0.93433)),
    ],
)
def test_wilsons_interval(fraction: float, count: int, ends: tuple[float, float]) -> None:
    assert wilson(fraction, count) == pytest.approx(ends, abs=2e-5)


def result(accuracy: float, chance: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"test_accuracy": accuracy, "chance_accuracy": chance, **more}


def write_to(folder: Path, name: str, value: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))


def test_a_teacher_at_chance_level_is_said() -> None:
    found = list(accuracy_caveats({"teacher": result(0.104, epochs=1), "student": result(0.4)}, 10_000))
    assert found == [
        "the teacher is at chance level: 10.40 % (95 % interval 9.8 .. 11.0 %), where always naming the most frequent "
        "class gives 10.00 %, after 1 epoch of training; its soft targets said nothing of the classes"
    ]
    assert list(accuracy_caveats({"teacher": result(0.11), "student": result(0.4)}, 10_000)) == []
    # chance is the most frequent class, not one over the classes
    (only,) = accuracy_caveats({"teacher": result(0.9), "student": result(0.55, chance=0.55)}, 10_000)
    assert only.startswith("the student is at chance level: 55.00 %")


def test_what_the_student_learned_from_is_judged(tmp_path: Path) -> None:
    """A teacher that was taught along is not at chance anymore; and one member does not speak for an ensemble."""

    write = partial(write_to, tmp_path)
    common = {"net": "x", "test_images": 10_000, "epochs": 0}
    write("teacher/result.json", {**common, **result(0.1)})
    write("student/result.json", {**common, **result(0.9), "weight_bits": 2, "act_bits": 2})
    assert any("the teacher is at chance level" in one for one in summarize(tmp_path).caveats)
    write("student/teacher/result.json", {**common, **result(0.95)})
    assert summarize(tmp_path).caveats == ()
    members = [{"test_accuracy": 0.1}, {"test_accuracy": 0.9}]
    (only,) = accuracy_caveats({"teacher": result(0.1, epochs=1, members=members)}, 10_000)
    assert only.startswith("the teacher's first member is at chance level") and "soft targets" not in only


def test_a_small_test_set_is_said_with_what_it_resolves() -> None:
    (only,) = accuracy_caveats({"teacher": result(0.95), "student": result(0.9)}, 200)
    assert only.startswith("the test set has only 200 images: the student's accuracy is known to ±4.2 points")
    assert list(accuracy_caveats({"student": result(0.9)}, 10_000)) == []
    assert list(accuracy_caveats({"student": result(0.9)}, None)) == []
    assert list(accuracy_caveats({"student": {"test_accuracy": 0.9}, "float": {}}, 10_000)) == []


def bench(student: float, twin: float, int8: float | None = None, flags: list[str] | None = None) -> dict[str, Any]:
    models: dict[str, Any] = {"student": {"median_ms": student, "p10_ms": student * 0.99},
                              "teacher": {"median_ms": twin, "p90_ms": twin * 1.01}}  # fmt: skip
    if int8 is not None:
        models["int8-static"] = {"median_ms": int8, "p90_ms": int8 * 1.2}
    return {"device": "pi", "machine": {"cpu_flags": flags}, "models": models}


def test_a_student_slower_than_its_twin_is_said_with_reasons() -> None:
    exported = {"fall_backs": ["layer1.0 (Conv) runs in float: why", "b (Conv) runs in float", "c x", "d y"]}
    assert list(latency_caveats(bench(2.0, 1.6, flags=["avx2"]), exported, "teacher")) == [
        "on pi the student is slower than its float twin: 1.25 times its median latency (layers left in float: "
        "layer1.0; b; c and 1 more; this processor has no int8 dot product)"
    ]
    (only,) = latency_caveats(bench(2.0, 1.6, flags=["avx512_vnni"]), {}, "teacher")
    assert only.endswith("1.25 times its median latency")
    (only,) = latency_caveats(bench(1.1, 3.0, int8=1.0, flags=["avx2"]), {}, "teacher")
    assert only == (
        "on pi the student is slower than the static int8 file of the float net: 1.10 times its median latency "
        "(their p10..p90 overlap)"
    )


@pytest.mark.parametrize("one", [bench(1.0, 2.0), bench(1.01, 1.0), {"device": "x"}, {"models": {"student": {}}}])
def test_a_student_that_is_not_slower_needs_no_word(one: dict[str, Any]) -> None:
    assert list(latency_caveats(one, {}, "teacher")) == []
    assert list(latency_caveats(bench(5.0, 1.0), {}, None)) == []  # the teacher is another net


def test_parity_that_failed_or_proves_little_is_said() -> None:
    assert list(parity_caveats({})) == list(parity_caveats({"passed": True})) == []
    (only,) = parity_caveats({"passed": False, "faults": ["a", "b"]})
    assert only == "parity FAILED, so the file is not the student: a; b"
    assert list(parity_caveats({"passed": True, "notes": ["one class"]})) == ["one class"]
    assert list(float_layers({"fall_backs": []})) == []
    assert list(float_layers({"fall_backs": ["a"]})) == ["1 layer left in float: a"]


def test_every_report_says_it(tmp_path: Path) -> None:
    write = partial(write_to, tmp_path)
    common = {"net": "<i>", "test_images": 200, "epochs": 3}
    write("teacher/result.json", {**common, **result(0.1)})
    write("student/result.json", {**common, **result(0.12), "weight_bits": 2, "act_bits": 2})
    write("export/export.json", {"student": {"size_bytes": 9, "fall_backs": ["<b>act (Conv) runs in float"]}})
    write("bench/local.json", {**bench(2.0, 1.0), "machine": {"cpu": "c", "onnxruntime": "1"}, "threads": 1,
                               "batch_size": 1, "rounds": 2, "warmup": 1})  # fmt: skip
    summary = summarize(tmp_path)
    assert summary.test_images == 200 and len(summary.caveats) == 5
    assert summary.models[0].interval == pytest.approx(wilson(0.1, 200))
    assert "10.00 % (6.6 .. 14.9 %)" in summary.to_text()
    page, text = render_page(summary, RunRecord()), render_text(summary)
    for caveat in summary.caveats:
        assert f"note: {caveat}" in summary.to_text().splitlines() and f"- {plain_text(caveat)}" in text
    assert "<b>act" not in page and "&lt;b&gt;act (Conv)" in page and "known to ±4.5 points" in page
    assert json.loads(json.dumps(summary.to_json()))["caveats"] == list(summary.caveats)
