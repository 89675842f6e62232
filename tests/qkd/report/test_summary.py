"""The report: figures collected from a run folder, as text and as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import beside
import pytest

from qkd.report import SearchRecord, render_page, render_text, summarize
from qkd.report.page import RunRecord
from qkd.report.table import align, markdown, plain_text
from qkd.report.text import parity_sentence
from qkd.report.tradeoff import _scores, device_charts, device_table
from qkd.units import bytes_text, megabytes, milliseconds, percent

_files = beside.load(Path(__file__).with_name("run_files.py"))
EVIL: str = _files.EVIL
Page: Any = _files.Page
make_devices: Callable[[Path], Path] = _files.make_devices
make_run: Callable[..., Path] = _files.make_run
record: Callable[[], RunRecord] = _files.record
write: Callable[[Path, Any], None] = _files.write


def test_the_summary_holds_the_figures_of_the_files(tmp_path: Path) -> None:
    summary = summarize(make_run(tmp_path / "run"))
    teacher, student = summary.models
    assert (teacher.role, student.role) == ("teacher (= FP32 twin)", "student w2a4")
    assert (teacher.test_accuracy, teacher.size_bytes, teacher.median_ms) == (0.99, 2_500_000, 0.5)
    assert (student.test_accuracy, student.size_bytes, student.median_ms) == (0.97, 98_765, 0.1234)
    assert (teacher.agreement, student.agreement, student.agreement_optimized) == (None, 1.0, 0.9999)
    assert summary.layers[0].used == (-60, 63) and summary.layers[0].parity_steps == 0.0
    assert summary.report is None
    assert json.loads(json.dumps(summary.to_json()))["models"][1]["p90_ms"] == 0.2


def test_three_sizes_and_the_cost_stand_in_both_reports(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sizes = {"size_bytes": 98_765, "packed_weight_bytes": 61_000, "theoretical_bytes": 65_400, "flavor": "ort"}
    other = {**sizes, "size_bytes": 123_456, "flavor": "qcdq"}
    write(run / "export" / "export.json", {"student": sizes, "teacher": {"size_bytes": 9}, "student.qcdq": other,
                                           "student.qonnx": {**other, "size_bytes": 7}})  # fmt: skip
    totals = {"parameters": 1000, "macs": 2000, "bops": 8000, "weight_bytes": 250, "parameter_bytes": 300,
              "peak_stored_bytes": 50, "peak_packed_bytes": 0, "peak_at": "conv1"}  # fmt: skip
    twin = {**totals, "bops": 2_048_000, "weight_bytes": 4000}
    write(run / "export" / "cost.json", {"student": totals, "float_twin": twin})
    compared = {"passed": False, "images": 9, "runtime_version": "1.31", "off": {"differing": 2}}
    write(run / "export" / "parity.qcdq.json", compared)
    summary = summarize(run)
    text, page = render_text(summary), render_page(summary, record())
    assert "| student w2a4 | resnet8 | 98.8 kB | 61.0 kB | 65.4 kB |" in text
    assert "| teacher (= FP32 twin) | resnet8 | 0.0 kB | - | - |" in text
    assert "| bit operations (BOPs) | 8,000 | 2,048,000 | 256.00 |" in text
    assert "| weights at their bit width | 250 B | 4,000 B | 16.00 |" in text
    assert "| activation peak, at bit width | 0 B | 0 B | - |" in text
    words = Page(page).words
    assert {"61.0 kB", "65.4 kB", "256.00", "2,048,000"} <= set(words)
    assert "student.qcdq.onnx (123.5 kB): FAILED: 9 test images, PyTorch against ONNX Runtime 1.31; the class" in text
    assert '<p class="failed">student.qcdq.onnx' in page and "student.qonnx.onnx (7 B): not compared." in text
    assert json.loads(json.dumps(summary.to_json()))["flavors"]["student.qcdq"]["parity"]["images"] == 9


def test_reports_without_sizes_or_cost_leave_them_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "export" / "export.json").unlink()
    text, page = render_text(summarize(run)), render_page(summarize(run), record())
    assert "## Size" not in text and "Cost" not in text and "<h2>Size" not in page


def test_a_row_is_one_line_whatever_is_in_its_names() -> None:
    assert align([["device", "model"], ["a", "b\nc\u2028d\te"]]).splitlines()[1] == r"a       b\x0ac\u2028d\x09e"


def test_bytes_are_whole_until_they_are_many() -> None:
    assert [bytes_text(size) for size in (0, 9_999, 10_000, 2_000_000)] == ["0 B", "9,999 B", "10.0 kB", "2.00 MB"]


def test_another_net_has_its_own_float_twin(tmp_path: Path) -> None:
    summary = summarize(make_run(tmp_path / "run", net="lenet5"))
    assert [row.role for row in summary.models] == ["teacher", "FP32 twin", "student w2a4"]
    assert summary.models[1].size_bytes == 400_000


def test_the_closing_table_reads_as_it_should(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("x")
    assert summarize(run).to_text().splitlines() == [
        "25.3 x smaller than FP32, 4.1 x faster, -2.0 accuracy points vs. the teacher.",
        "model                  net          test accuracy (95 %)  parity (optimized)  ONNX file  latency (median)",
        "teacher (= FP32 twin)  resnet8  99.00 % (97.3 .. 99.6 %)                   -    2.50 MB            0.5 ms",
        "student w2a4           resnet8  97.00 % (94.7 .. 98.3 %)  100.00 % (99.99 %)    98.8 kB          0.123 ms",
        "note: the test set has only 360 images: the student's accuracy is known to ±1.8 points (`qkd compare` "
        "compares runs image by image, which is more precise)",
        "note: 1 layer left in float: <script>alert('x')</script>&\"| (silu) in float",
        f"report: {run / 'report.html'}",
    ]


def test_a_run_that_got_nowhere_yet_has_gaps(tmp_path: Path) -> None:
    assert "nothing has been trained yet" in summarize(tmp_path).to_text()
    write(tmp_path / "teacher" / "result.json", {"role": "teacher", "net": "resnet8", "test_accuracy": 0.5})
    summary = summarize(tmp_path)
    assert "no report yet" in summary.to_text()
    assert render_text(summary) and render_page(summary, RunRecord())


@pytest.mark.parametrize("is_equal", [True, False])
def test_the_page_stands_alone_and_says_it_all(tmp_path: Path, is_equal: bool) -> None:
    text = render_page(summarize(make_run(tmp_path / "run", is_equal=is_equal)), record())
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object"} & set(names), "no resource from elsewhere, no code"
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)
    assert names.count("svg") == 8, "loss and accuracy of two roles, two agents, a device's latency and size"
    assert "prefers-color-scheme: dark" in text
    words = "\n".join(page.words)
    assert EVIL in words, "escaped, it is text again"
    assert ("FAILED" in words) is (not is_equal)
    assert ('<p class="failed">' in text) is (not is_equal)
    for part in (
        "97.00 %",
        "98.8 kB",
        "0.123 ms",
        "-60 .. 63",
        "-64 .. 63",
        "2 steps",
        "equal",
        "a processor",
        "Rotate",
    ):
        assert part in words, part


def test_the_text_report_is_a_table(tmp_path: Path) -> None:
    text = render_text(summarize(make_run(tmp_path / "run")))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 + 4 + 4 + 4 + 3  # models, sizes, devices, layers
    assert "\\|" in text, "a bar in a name does not split a cell"
    assert "passed: 360 test images" in text


def test_what_stays_in_float_is_in_both_reports(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary = summarize(run)
    assert summary.fall_backs == (f"{EVIL} (silu) in float",)
    assert "## Left in float" in render_text(summary)
    page = Page(render_page(summary, record()))
    assert f"{EVIL} (silu) in float" in page.words and "Left in float" in page.words
    assert not [tag for tag, _ in page.tags if tag == "script"]


def test_the_text_report_tells_of_the_searches_and_the_agents(tmp_path: Path) -> None:
    found = SearchRecord((3, 6, 8), (0.5, 0.6, 0.71), (0.4, 0.5, 0.7), (0.45, 0.6, 0.69), "It trained on 9 images.")
    other = SearchRecord((2,), (0.25,), (0.125,), (0.25,), "")
    summary = summarize(make_run(tmp_path / "run"))
    words = {"teacher": "found by the teacher's search, flip", "student": "trivial"}
    text = render_text(summary, searches={"teacher": found, "student": other}, agents=words)
    assert "## Search" in text and "It trained on 9 images." in text
    assert "| teacher | 3 | 8 | 69.00 % | 71.00 % | 70.00 % | 50.00 % |" in text
    assert "| student | 1 | 2 | 25.00 % | 25.00 % | 12.50 % | 25.00 % |" in text
    assert "- teacher: found by the teacher's search, flip\n- student: trivial\n" in text
    plain = render_text(summary)
    assert "Search" not in plain and "Agents" not in plain


def test_the_parity_sentence_counts_codes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "export" / "parity.json"
    parity = json.loads(path.read_text())
    first = {"name": "a", "values": 1500, "differing": 2, "differing_on": 1}
    layers = [first, {"name": "b", "values": 500, "differing": 0, "differing_on": 3}]
    path.write_text(json.dumps({**parity, "layers": layers, "layer_images": 32}))
    sentence = parity_sentence(summarize(run))
    assert "on 32 images: 2 of 2,000 codes differ between student and file, 4 between" in sentence
    path.write_text(json.dumps({**parity, "layers": []}))
    assert "codes" not in parity_sentence(summarize(run))


def test_every_device_has_lines_and_two_pictures(tmp_path: Path) -> None:
    summary = summarize(make_devices(make_run(tmp_path / "run")))
    assert [one["device"] for one in summary.devices] == ["local", "board", "pi"]
    assert summary.bench["models"]["student"]["median_ms"] == 0.1234, "this machine comes first"
    _, *rows = device_table(summary)
    assert [row[:3] for row in rows] == [
        ["local", "student", "0.123 ms"], ["local", "teacher", "0.5 ms"], ["board", "-", "-"],
        ["pi", "student", "2 ms"], ["pi", "teacher (FP32)", "8 ms"],
    ]  # fmt: skip
    assert rows[2][-1] == f"FAILED: Connection refused {EVIL}"
    assert rows[3][3:] == [
        "-",
        "4 ms",
        "5 ms",
        "0.250",
        "98.8 kB",
        "60.00 MB",
        "97.00 %",
        "100.00 %",
        "weights repacked to int8",
    ]
    charts = device_charts(summary)
    assert list(charts) == ["local", "pi"] and all(len(pictures) == 2 for pictures in charts.values())
    assert "test accuracy against latency" in charts["local"][0]
    assert "accuracy on 256 images there against size" in charts["pi"][1]
    page = render_page(summary, record())
    words = "\n".join(Page(page).words)
    assert f"FAILED: Connection refused {EVIL}" in words and "<script>" not in page
    assert page.count("<svg") == 10 and "Connection refused" in render_text(summary)


def test_a_summary_without_this_machine_shows_another(tmp_path: Path) -> None:
    run = make_devices(make_run(tmp_path / "run"))
    (run / "bench" / "local.json").unlink()
    summary = summarize(run)
    assert summary.bench["device"] == "pi" and summary.models[1].median_ms == 2.0


def test_a_template_in_a_name_stays_text(tmp_path: Path) -> None:
    page = render_page(summarize(make_run(tmp_path / "run")), replace(record(), config="{{ 7 * 7 }}{% raw %}"))
    assert "<pre>{{ 7 * 7 }}{% raw %}</pre>" in page


@pytest.mark.parametrize(
    ("fraction", "text"), [(1.0, "100.00 %"), (0.99999, "99.99 %"), (0.98765, "98.77 %"), (0, "0.00 %"), (None, "-")]
)
def test_percent_never_rounds_up_to_all(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("name", "escaped"),
    [("snake_case", "snake_case"), ("__init__", r"\_\_init\_\_"), ("_a_b_", r"\_a_b\_"), ("a_ _b", r"a\_ \_b")],
)
def test_underscores_that_are_markup_are_escaped(name: str, escaped: str) -> None:
    assert plain_text(name) == escaped


def test_figures_carry_units() -> None:
    assert [megabytes(size) for size in (None, 12, 99_950, 1_000_000)] == ["-", "0.0 kB", "100.0 kB", "1.00 MB"]
    assert [milliseconds(value) for value in (None, 0.01234, 12.345)] == ["-", "0.0123 ms", "12.3 ms"]
    assert align([["a", "b", "c"], ["aa", "b", "10"]]) == "a   b   c\naa  b  10"
    assert markdown([["a|b"], ["c\nd"]]) == "| a\\|b |\n| --- |\n| c d |"


def test_nets_that_helped_the_student_have_lines_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    members = [{"test_accuracy": 0.9}, {"test_accuracy": 0.92}]
    teacher = {"net": "resnet8", "test_accuracy": 0.9, "members": members, "ensemble": {"test_accuracy": 0.95}}
    write(run / "teacher" / "result.json", teacher)
    peers = [{"net": "resnet8", "weight_bits": None, "act_bits": None, "test_accuracy": 0.94},
             {"net": "resnet8", "weight_bits": 4, "act_bits": 4, "test_accuracy": 0.93}]  # fmt: skip
    student = {"net": "resnet8", "test_accuracy": 0.97, "weight_bits": 2, "act_bits": 4, "peers": peers}
    write(run / "student" / "result.json", student)
    write(run / "student" / "auxiliary" / "result.json",
          {"net": "lenet5", "weight_bits": 8, "act_bits": 8, "test_accuracy": 0.96})  # fmt: skip
    write(run / "student" / "teacher" / "result.json", {"net": "resnet8", "test_accuracy": 0.91})
    first, *_ = summarize(run).models
    assert first.role.endswith(", taught along") and first.test_accuracy == 0.91  # the one that is exported
    lines = [(row.role, row.net, row.test_accuracy) for row in summarize(run).models[2:]]
    assert lines == [
        ("ensemble of 2 teachers", "resnet8", 0.95), ("auxiliary teacher w8a8", "lenet5", 0.96),
        ("teacher, before it was taught", "resnet8", 0.9), ("peer", "resnet8", 0.94), ("peer w4a4", "resnet8", 0.93),
    ]  # fmt: skip
    assert "ensemble of 2 teachers" in render_text(summarize(run))
    followed = summarize(run).followed
    assert followed is not None and followed.role == "ensemble of 2 teachers"


def test_a_picture_shows_the_teacher_that_is_exported(tmp_path: Path) -> None:
    """Not the line of what it was before it was taught, which also begins with its role."""
    run = make_run(tmp_path)
    write(run / "student" / "teacher" / "result.json", {"net": "resnet8", "test_accuracy": 0.91})
    summary = summarize(run)
    assert summary.teacher is not None and summary.teacher.test_accuracy == 0.91
    scores, words = _scores(summary, {"models": {"student": {}, "teacher": {}}})
    assert (scores["teacher"], words) == (0.91, "test accuracy")
    assert summary.followed == summary.teacher


NASTY = "<script>alert(1)</script> [x](javascript:y) `c` | \x1b[31m &lt; \n# head"


def test_nothing_of_a_name_or_device_comes_to_life(tmp_path: Path) -> None:
    run = make_devices(make_run(tmp_path / "<img src=x onerror=y>"))
    for name in ("pi", "local"):
        bench = json.loads((run / "bench" / f"{name}.json").read_text())
        bench["device"] = NASTY
        bench.setdefault("machine", {"onnxruntime": NASTY})["cpu"] = NASTY
        write(run / "bench" / f"{name}.json", bench)
    layers = json.loads((run / "export" / "layers.json").read_text())
    layers["layers"][0]["name"] = NASTY
    write(run / "export" / "layers.json", layers)
    summary = summarize(run)
    text = render_text(summary, agents={NASTY: NASTY})
    page = render_page(summary, replace(record(), agents={NASTY: NASTY}, environment={NASTY: NASTY}))
    for made in (text, page):
        assert "<script" not in made and "<img" not in made
        assert "\x1b" not in made and "\\x1b[31m" in made.replace("\\[", "[").replace("\\\\", "\\")
    assert "[x](" not in text and "\n# head" not in text and text.startswith("# &lt;img src=x onerror=y&gt;\n")


def with_low_bit(run: Path, *, is_same: bool = True) -> Path:
    """Add what a bench with the low-bit provider and static int8 leaves, and the comparison of the export stage."""
    row = {"p10_ms": 0.04, "p90_ms": 0.06, "size_bytes": 98_765}
    bench = json.loads((run / "bench" / "local.json").read_text())
    student, teacher = bench["models"]["student"], bench["models"]["teacher"]
    ours = {**row, "model": "student", "provider": "LowBitExecutionProvider", "median_ms": 0.05}
    models = {"student": {**student, "model": "student", "provider": "CPUExecutionProvider"}}
    models |= {"student, low-bit provider": ours, "teacher": {**teacher, "model": "teacher"}}
    models["int8-static"] = {**row, "model": "int8-static", "median_ms": 0.1, "size_bytes": 300_000}
    write(run / "bench" / "local.json", {**bench, "models": models})
    layers = [{"values": 700, "is_claimed": True}, {"values": 60, "is_claimed": False}]
    compared = {"provider": "LowBitExecutionProvider", "images": 360, "claimed_layers": 7, "layer_count": 9,
                "layers": layers, "faults": [] if is_same else ["they differ"]}  # fmt: skip
    parity = json.loads((run / "export" / "parity.json").read_text())
    write(run / "export" / "parity.json", {**parity, "provider": compared})
    return run


def test_the_low_bit_provider_and_int8_have_rows_beside_the_students(tmp_path: Path) -> None:
    run = with_low_bit(make_run(tmp_path / "run"))
    summary = summarize(run)
    assert [(row.role, row.median_ms, row.test_accuracy) for row in summary.models] == [
        ("teacher (= FP32 twin)", 0.5, 0.99), ("student w2a4", 0.1234, 0.97),
        ("student w2a4, low-bit provider", 0.05, 0.97), ("static int8 of the float net", 0.1, None),
    ]  # fmt: skip
    text, page = render_text(summary), render_page(summary, record())
    assert "| student w2a4, low-bit provider | resnet8 | 97.00 %" in text
    assert text.count("student w2a4, low-bit provider") == 1, "its file has no other size"
    assert " LowBitExecutionProvider computes 7 of 9 layers: the outputs of 360 images, and 700 codes" in text
    assert "are those of the CPU provider." in text and "student, low-bit provider" in Page(page).words
    labels = [row[1] for row in device_table(summary)[1:]]
    assert labels == ["student", "student, low-bit provider", "teacher", "int8-static"]
    assert device_charts(summary)["local"], "the student's accuracy is also the one under the provider"
    assert "with the low-bit provider 0.50 times" in text, "beside: the student is slower than static int8"


def test_an_accuracy_under_a_provider_is_not_claimed_where_outputs_differ(tmp_path: Path) -> None:
    summary = summarize(with_low_bit(make_run(tmp_path / "run"), is_same=False))
    assert [row.test_accuracy for row in summary.models] == [0.99, 0.97, None, None]
    assert "are NOT those of the CPU provider." in parity_sentence(summary)
