"""The report: figures collected from a run folder, drawn and written."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from qkd.files import DamagedFileError
from qkd.report import SearchRecord, render_page, render_text, summarise, tradeoff
from qkd.report import page as page_module
from qkd.report.charts import LEFT, Point, Series, line_chart, scatter_chart, schedule_chart
from qkd.report.drawing import CURVES, INK, RULE, clean
from qkd.report.page import RunRecord
from qkd.report.stacks import COLORS as STACKED
from qkd.report.table import align, bytes_text, markdown, megabytes, milliseconds, percent
from qkd.report.text import parity_sentence
from qkd.report.tradeoff import device_charts, device_table

EVIL = "<script>alert('x')</script>&\"|"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_run(path: Path, *, net: str = "resnet8", is_equal: bool = True) -> Path:
    """Write what the stages leave, with known figures."""
    write(path / "teacher" / "result.json", {"role": "teacher", "net": "resnet8", "test_accuracy": 0.99})
    student = {"role": "student", "net": net, "test_accuracy": 0.97, "weight_bits": 2, "act_bits": 4}
    write(path / "student" / "result.json", student)
    if net != "resnet8":
        write(path / "student" / "float" / "result.json", {"role": "float", "net": net, "test_accuracy": 0.98})
    write(path / "export" / "export.json", {
        "teacher": {"size_bytes": 2_500_000},
        "student": {"size_bytes": 98_765, "fall_backs": [f"{EVIL} (silu) in float"]},
        "float": {"size_bytes": 400_000},
    })  # fmt: skip
    write(path / "export" / "parity.json", {
        "passed": is_equal, "images": 360, "runtime_version": "1.31",
        "off": {"top1_agreement": 1.0 if is_equal else 0.99, "differing": 0 if is_equal else 4},
        "on": {"top1_agreement": 0.9999, "differing": 1},
    })  # fmt: skip
    rows = [
        {"name": "conv1", "kind": "conv", "weight_bits": 8, "act_bits": 8, "code_min": -60, "code_max": 63,
         "range_low": -64, "range_high": 63, "parameters": 144, "macs": 9216, "parity_steps": 0},
        {"name": EVIL, "kind": "linear", "weight_bits": 2, "act_bits": 4, "code_min": -1, "code_max": 1,
         "range_low": -2, "range_high": 1, "parameters": 10, "macs": 10, "parity_steps": 2},
    ]  # fmt: skip
    write(path / "export" / "layers.json", {"layers": rows})
    write(path / "bench" / "local.json", {
        "machine": {"cpu": "a processor", "onnxruntime": "1.31"}, "threads": 1, "batch_size": 1,
        "rounds": 5, "warmup": 2,
        "models": {"student": {"median_ms": 0.1234, "p10_ms": 0.1, "p90_ms": 0.2, "size_bytes": 98_765},
                   "teacher": {"median_ms": 0.5, "p10_ms": 0.4, "p90_ms": 0.9, "size_bytes": 2_500_000}},
    })  # fmt: skip
    return path


class Page(HTMLParser):
    """Collects tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def record() -> RunRecord:
    line = {"phase": "all", "train_loss": 2.0, "train_accuracy": 0.5, "val_accuracy": 0.4}
    lines = [
        {**line, "epoch": epoch, "terms": {"cross_entropy": 1.0 / epoch, "soft_target": 3.0}} for epoch in (1, 2, 3)
    ]
    return RunRecord(
        metrics={"teacher": lines, "student": lines},
        agents={"student": f"file, schedule {EVIL}"},
        schedules={"teacher": {"Rotate": [0.2, 0.2, 0.8]}, "student": {EVIL: [0.5, 0.0, 1.0]}},
        config=f"name: {EVIL}",
        environment={"python": "3", "versions": {"torch": EVIL}},
    )


def test_the_summary_holds_the_figures_of_the_files(tmp_path: Path) -> None:
    summary = summarise(make_run(tmp_path / "run"))
    teacher, student = summary.models
    assert (teacher.role, student.role) == ("teacher (= FP32 twin)", "student w2a4")
    assert (teacher.test_accuracy, teacher.size_bytes, teacher.median_ms) == (0.99, 2_500_000, 0.5)
    assert (student.test_accuracy, student.size_bytes, student.median_ms) == (0.97, 98_765, 0.1234)
    assert (teacher.agreement, student.agreement, student.agreement_optimised) == (None, 1.0, 0.9999)
    assert summary.layers[0].used == (-60, 63) and summary.layers[0].parity_steps == 0.0
    assert summary.report is None
    assert json.loads(json.dumps(summary.to_json()))["models"][1]["p90_ms"] == 0.2


def test_three_sizes_and_the_cost_stand_in_both_reports(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    sizes = {"size_bytes": 98_765, "packed_weight_bytes": 61_000, "theoretical_bytes": 65_400, "flavour": "ort"}
    other = {**sizes, "size_bytes": 123_456, "flavour": "qcdq"}
    write(run / "export" / "export.json", {"student": sizes, "teacher": {"size_bytes": 9}, "student.qcdq": other,
                                           "student.qonnx": {**other, "size_bytes": 7}})  # fmt: skip
    totals = {"parameters": 1000, "macs": 2000, "bops": 8000, "weight_bytes": 250, "parameter_bytes": 300,
              "peak_stored_bytes": 50, "peak_packed_bytes": 0, "peak_at": "conv1"}  # fmt: skip
    twin = {**totals, "bops": 2_048_000, "weight_bytes": 4000}
    write(run / "export" / "cost.json", {"student": totals, "float_twin": twin})
    compared = {"passed": False, "images": 9, "runtime_version": "1.31", "off": {"differing": 2}}
    write(run / "export" / "parity.qcdq.json", compared)
    summary = summarise(run)
    text, page = render_text(summary), render_page(summary, record())
    assert "| student w2a4 | resnet8 | 98.8 kB | 61.0 kB | 65.4 kB |" in text
    assert "| teacher (= FP32 twin) | resnet8 | 0.0 kB | - | - |" in text
    assert "| bit operations (BOPs) | 8,000 | 2,048,000 | 256.00 |" in text
    assert "| weights at their bits | 250 B | 4,000 B | 16.00 |" in text
    assert "| activation peak, at their bits | 0 B | 0 B | - |" in text
    words = Page(page).words
    assert {"61.0 kB", "65.4 kB", "256.00", "2,048,000"} <= set(words)
    assert "student.qcdq.onnx (123.5 kB): FAILED: 9 test images, PyTorch against ONNX Runtime 1.31; the class" in text
    assert '<p class="failed">student.qcdq.onnx' in page and "student.qonnx.onnx (7 B): not compared." in text
    assert json.loads(json.dumps(summary.to_json()))["flavours"]["student.qcdq"]["parity"]["images"] == 9


def test_reports_without_sizes_or_cost_leave_them_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "export" / "export.json").unlink()
    text, page = render_text(summarise(run)), render_page(summarise(run), record())
    assert "## Size" not in text and "Cost" not in text and "<h2>Size" not in page


def test_a_row_is_one_line_whatever_is_in_its_names() -> None:
    assert align([["device", "model"], ["a", "b\nc\u2028d\te"]]).splitlines()[1] == r"a       b\x0ac\u2028d\x09e"


def test_bytes_are_whole_until_they_are_many() -> None:
    assert [bytes_text(size) for size in (0, 9_999, 10_000, 2_000_000)] == ["0 B", "9,999 B", "10.0 kB", "2.00 MB"]


def test_another_net_has_its_own_float_twin(tmp_path: Path) -> None:
    summary = summarise(make_run(tmp_path / "run", net="lenet5"))
    assert [row.role for row in summary.models] == ["teacher", "FP32 twin", "student w2a4"]
    assert summary.models[1].size_bytes == 400_000


def test_the_closing_table_reads_as_it_should(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "report.html").write_text("x")
    assert summarise(run).to_text().splitlines() == [
        "model                  net          test accuracy (95 %)  parity (optimized)  ONNX file  latency (median)",
        "teacher (= FP32 twin)  resnet8  99.00 % (97.3 .. 99.6 %)                   -    2.50 MB            0.5 ms",
        "student w2a4           resnet8  97.00 % (94.7 .. 98.3 %)  100.00 % (99.99 %)    98.8 kB          0.123 ms",
        "note: the test set has only 360 images: the student's accuracy is known to about 1.8 points either way, and "
        "smaller differences between rows say nothing",
        "note: 1 layer left in float: <script>alert('x')</script>&\"| (silu) in float",
        f"report: {run / 'report.html'}",
    ]


def test_a_run_that_got_nowhere_yet_has_gaps(tmp_path: Path) -> None:
    assert "nothing has been trained yet" in summarise(tmp_path).to_text()
    write(tmp_path / "teacher" / "result.json", {"role": "teacher", "net": "resnet8", "test_accuracy": 0.5})
    summary = summarise(tmp_path)
    assert "no report yet" in summary.to_text()
    assert render_text(summary) and render_page(summary, RunRecord())


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="result.json: not JSON"):
        summarise(tmp_path)


@pytest.mark.parametrize("is_equal", [True, False])
def test_the_page_stands_alone_and_says_it_all(tmp_path: Path, is_equal: bool) -> None:
    text = render_page(summarise(make_run(tmp_path / "run", is_equal=is_equal)), record())
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


def test_every_chart_is_well_formed(tmp_path: Path) -> None:
    text = render_page(summarise(make_run(tmp_path / "run")), record())
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 8
    for chart in charts:
        ElementTree.fromstring(chart)


def test_the_text_report_is_a_table(tmp_path: Path) -> None:
    text = render_text(summarise(make_run(tmp_path / "run")))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 + 4 + 4 + 4 + 3  # models, sizes, devices, layers
    assert "\\|" in text, "a bar in a name does not split a cell"
    assert "passed: 360 test images" in text


def test_what_stays_in_float_is_in_both_reports(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    summary = summarise(run)
    assert summary.fall_backs == (f"{EVIL} (silu) in float",)
    assert "## Left in float" in render_text(summary)
    page = Page(render_page(summary, record()))
    assert f"{EVIL} (silu) in float" in page.words and "Left in float" in page.words
    assert not [tag for tag, _ in page.tags if tag == "script"]


def test_the_text_report_tells_of_the_searches_and_the_agents(tmp_path: Path) -> None:
    found = SearchRecord((3, 6, 8), (0.5, 0.6, 0.71), (0.4, 0.5, 0.7), (0.45, 0.6, 0.69), "It trained on 9 images.")
    other = SearchRecord((2,), (0.25,), (0.125,), (0.25,), "")
    summary = summarise(make_run(tmp_path / "run"))
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
    sentence = parity_sentence(summarise(run))
    assert "on 32 images: 2 of 2,000 codes differ between student and file, 4 between" in sentence
    path.write_text(json.dumps({**parity, "layers": []}))
    assert "codes" not in parity_sentence(summarise(run))


@pytest.mark.parametrize("notes", [-1, "x", [1], {"a": 1}])
def test_parity_notes_of_another_type_are_refused_by_place(tmp_path: Path, notes: object) -> None:
    run = make_run(tmp_path / "run")
    path = run / "export" / "parity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": notes}))
    with pytest.raises(DamagedFileError, match=r"parity\.json: notes"):
        summarise(run)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("teacher/result.json", "test_accuracy", 3),
        ("teacher/result.json", "chance_accuracy", -0.1),
        ("student/result.json", "test_images", 0),
        ("student/result.json", "test_images", "x"),
        ("student/result.json", "epochs", 1.5),
        ("export/parity.json", "images", 0),
    ],
)
def test_figures_that_cannot_be_are_refused_by_place(tmp_path: Path, name: str, key: str, value: object) -> None:
    path = make_run(tmp_path / "run") / name
    write(path, {**json.loads(path.read_text()), key: value})
    with pytest.raises(DamagedFileError, match=rf"{name}: {key}: .*got {re.escape(repr(value))}"):
        summarise(tmp_path / "run")


def test_an_ensemble_without_members_is_refused_by_name(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run") / "teacher" / "result.json"
    whole = json.loads(path.read_text())
    write(path, {**whole, "ensemble": None})
    summarise(tmp_path / "run")
    write(path, {**whole, "ensemble": {"test_accuracy": 0.5}})
    with pytest.raises(DamagedFileError, match="an ensemble comes with its members"):
        summarise(tmp_path / "run")


def make_devices(run: Path) -> Path:
    """Add a device that measured with a sample, and one that failed."""
    row = {"p10_ms": None, "p90_ms": 4.0, "p99_ms": 5.0, "peak_memory_bytes": 60_000_000, "agreement": 1.0}
    write(run / "bench" / "pi.json", {
        "device": "pi", "failure": None, "images": 256, "reference": "teacher", "models": {
            "student": {**row, "median_ms": 2.0, "size_bytes": 98_765, "accuracy": 0.97, "repacked": ["int8"]},
            "teacher": {**row, "median_ms": 8.0, "size_bytes": 2_500_000, "accuracy": 0.99, "notes": ["hot: " + EVIL]},
        },
    })  # fmt: skip
    write(run / "bench" / "board.json", {"device": "board", "failure": f"Connection refused {EVIL}", "models": {}})
    return run


def test_every_device_has_lines_and_two_pictures(tmp_path: Path) -> None:
    summary = summarise(make_devices(make_run(tmp_path / "run")))
    assert [one["device"] for one in summary.devices] == ["local", "board", "pi"]
    assert summary.bench["models"]["student"]["median_ms"] == 0.1234, "this machine comes first"
    _, *rows = device_table(summary)
    assert [row[:3] for row in rows] == [
        ["local", "student", "0.123 ms"], ["local", "teacher", "0.5 ms"], ["board", "-", "-"],
        ["pi", "student", "2 ms"], ["pi", "teacher", "8 ms"],
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
        "repacked to int8",
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
    summary = summarise(run)
    assert summary.bench["device"] == "pi" and summary.models[1].median_ms == 2.0


def drawn(chart: str) -> dict[str, list[tuple[float, float]]]:
    """Return note -> corners of what bears it, in pixels from the top left corner."""
    found = {}
    for group in ElementTree.fromstring(chart).iter("g"):
        title, path = group.find("title"), group.find("path")
        if title is not None and path is not None:
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", path.attrib["d"])]
            found[str(title.text)] = list(zip(numbers[::2], numbers[1::2], strict=True))
    return found


def texts(chart: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(chart).iter("text"))


def middle(corners: list[tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*corners, strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


def test_points_of_a_scatter_chart_lie_where_their_values_are() -> None:
    chart = scatter_chart("t", [Point("low", 2.0, 0.5), Point("high", 8.0, 0.9), Point("mid", 5.0, 0.7)], x_label="ms")
    found = drawn(chart)
    low, mid, high = (middle(found[name]) for name in ("low: 2, 0.5", "mid: 5, 0.7", "high: 8, 0.9"))
    assert low[0] < mid[0] < high[0] and low[1] > mid[1] > high[1], "right is slower, up is better"
    assert mid == pytest.approx(((low[0] + high[0]) / 2, (low[1] + high[1]) / 2), abs=0.2)
    assert low[0] - LEFT == pytest.approx((high[0] - LEFT) / 4, abs=0.2), "the axis starts at zero"
    assert "<script>" not in scatter_chart("t", [Point(EVIL, 1, 1)], x_label="ms")
    assert "nothing was recorded" in scatter_chart("t", [Point("a", math.nan, 1.0)], x_label="ms")
    assert scatter_chart("t", [Point("a", 0.0, 0.0)], x_label="ms").startswith("<svg")


def test_labels_of_near_points_do_not_overlap() -> None:
    chart = scatter_chart("t", [Point(name, 1.0, 0.9) for name in "abcd"], x_label="ms", percent=True)
    heights = [float(one.attrib["y"]) for one in texts(chart) if one.text in ("a", "b", "c", "d")]
    assert len(heights) == 4
    assert all(after - before >= 12 - 1e-5 for before, after in zip(heights, heights[1:], strict=False))


def test_a_model_has_one_color_on_every_device(tmp_path: Path) -> None:
    for pictures in device_charts(summarise(make_devices(make_run(tmp_path / "run")))).values():
        for chart in pictures:
            for name, color in (("teacher", "--c1"), ("student", "--c2")):
                (dot,) = [one for one in ElementTree.fromstring(chart).iter("g")
                          if str(one.findtext("title")).startswith(f"{name}: ")]  # fmt: skip
                assert f"fill: var({color}, " in dot[1].attrib["style"]


def test_a_curve_goes_where_its_values_go() -> None:
    chart = line_chart("t", [Series("a", [(1, 0.0), (2, 1.0), (3, 0.5)])], x_label="epoch")
    first, second, third = drawn(chart)["a"]
    assert first[0] < second[0] < third[0]
    assert second[1] < third[1] < first[1], "up is a smaller y"
    assert third[1] == pytest.approx((first[1] + second[1]) / 2, abs=0.1)


def test_points_that_are_not_finite_are_left_out() -> None:
    chart = line_chart("t", [Series("a", [(1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)])], x_label="epoch")
    assert [len(points) for points in drawn(chart).values()] == [2]
    assert "nan" not in chart and not re.search(r"\binf", chart)
    assert "nothing was recorded" in line_chart("t", [Series("a", [(1, math.nan)])], x_label="epoch")


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1e9, 1e9], [1e-12, 2e-12], [-1.0, 1e6], [-1e300, 1e300]])
def test_any_range_can_be_drawn(values: list[float]) -> None:
    found = drawn(line_chart("t", [Series("a", list(enumerate(values)))], x_label="epoch"))
    assert found
    for points in found.values():
        assert all(0 <= x <= 460 and 0 <= y <= 240 for x, y in points)


def test_a_long_legend_takes_more_lines_not_more_width() -> None:
    names = [f"similarity_preserving_{index}" for index in range(6)]
    chart = line_chart("t", [Series(name, [(1, 1.0), (2, 2.0)]) for name in names], x_label="epoch")
    labels = [one for one in texts(chart) if one.text in names]
    assert len(labels) == 6 and len({one.attrib["y"] for one in labels}) == 3
    assert all(float(one.attrib["x"]) + 6.4 * 24 <= 460 and float(one.attrib["y"]) > 13 for one in labels)
    assert 'viewBox="0 0 460 268"' in chart


def test_a_schedule_draws_a_cell_a_stretch() -> None:
    chart = schedule_chart("t", {"Rotate": [0.2, 0.2, 0.8, 0.0], "Invert": [0.0, 0.0, 0.0, 1.0]})
    found = drawn(chart)
    assert list(found) == ["Rotate, epoch 1-2: 0.200", "Rotate, epoch 3-3: 0.800", "Invert, epoch 4-4: 1.000"]
    widths = [max(x for x, _ in corners) - min(x for x, _ in corners) for corners in found.values()]
    assert widths[0] == pytest.approx(2 * widths[1]) and widths[1] == pytest.approx(widths[2])
    assert re.findall(r"opacity: ([\d.]+)", chart) == ["0.2", "0.8"], "and one that is full"
    assert "no operation" in schedule_chart("t", {})
    assert not drawn(schedule_chart("t", {"flip": [0.0]}))


def test_a_long_heading_is_smaller_so_that_it_fits() -> None:
    long = "ssh://someone@board.example.com: accuracy on 256 images there against latency"
    sizes = []
    for title in ("short", long):
        (heading,) = [one for one in texts(scatter_chart(title, [Point("a", 1, 1)], x_label="ms")) if one.text == title]
        sizes.append(float(re.findall(r"([\d.]+)px", heading.attrib["style"])[0]))
    assert sizes[0] == 12 and sizes[1] * 0.7 * len(long) <= 461


HOSTILE = [
    "$\\frac{1",
    "_hidden",
    "\u4e2d\u6587 \U0001f600",
    "a\nb\tc",
    "\x1b[31m",
    "\ud800",
    "\uffff",
    "#1d2430",
    "{{ 7 * 7 }}",
]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_picture_shows_any_name_as_text(name: str) -> None:
    charts = [
        line_chart(name, [Series(name, [(1, 1.0)])], x_label=name),
        scatter_chart(name, [Point(name, 1.0, 1.0)], x_label=name),
        schedule_chart(name, {name: [0.5]}, column_label=name),
    ]
    for chart in charts:
        words = [one.text for one in texts(chart)]
        assert sum(str(one).endswith((clean(name), f"{clean(name)} 1")) for one in words) == 3
        assert any(clean(name) in str(one.text) for one in ElementTree.fromstring(chart).iter("title"))


def test_a_template_in_a_name_stays_text(tmp_path: Path) -> None:
    page = render_page(summarise(make_run(tmp_path / "run")), replace(record(), config="{{ 7 * 7 }}{% raw %}"))
    assert "<pre>{{ 7 * 7 }}{% raw %}</pre>" in page


def test_the_same_run_is_the_same_page_whatever_the_settings_of_matplotlib(tmp_path: Path) -> None:
    summary = summarise(make_run(tmp_path / "run"))
    page = render_page(summary, record())
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "text.usetex": True, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert render_page(summary, record()) == page
        assert dict(matplotlib.rcParams) == before
    assert " id=" not in page, "nothing of a picture can be taken for something of another"


def test_pictures_follow_the_page_and_fit_it() -> None:
    chart = ElementTree.fromstring(line_chart("t", [Series("a", [(1, 1.0), (2, 2.0)], 1)], x_label="epoch"))
    assert set(chart.attrib) == {"viewBox", "role", "aria-label", "font-family", "stroke-linejoin"}
    styles = [one.attrib["style"] for one in chart.iter() if "style" in one.attrib]
    colors = {color for style in styles for color in re.findall(r"(?:fill|stroke): ([^;]+)", style)}
    assert colors == {"none", "currentColor", "var(--rule, #d7dce3)", "var(--c2, #c2410c)"}, "light and dark"
    assert not set(STACKED.values()) & {INK, RULE, *CURVES}, "else they would be taken for the page's"


def test_the_libraries_of_the_report_are_imported_where_they_are_used_and_never_pyplot() -> None:
    files = sorted((Path(__file__).parents[2] / "qkd").rglob("*.py"))
    texts = {file.name: text for file in files if re.search("matplotlib|jinja2", text := file.read_text("utf-8"))}
    assert {"charts.py", "drawing.py", "page.py"} <= set(texts)
    for name, text in texts.items():
        tops = [ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [line for line in tops if "matplotlib" in line or "jinja2" in line], name
        assert "import pyplot" not in text and "matplotlib.pyplot" not in text


@pytest.mark.parametrize(
    ("fraction", "text"), [(1.0, "100.00 %"), (0.99999, "99.99 %"), (0.98765, "98.77 %"), (0, "0.00 %"), (None, "-")]
)
def test_percent_never_rounds_up_to_all(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text


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
    first, *_ = summarise(run).models
    assert first.role.endswith(", taught along") and first.test_accuracy == 0.91  # the one that is exported
    lines = [(row.role, row.net, row.test_accuracy) for row in summarise(run).models[2:]]
    assert lines == [
        ("ensemble of 2 teachers", "resnet8", 0.95), ("auxiliary teacher w8a8", "lenet5", 0.96),
        ("teacher, before it was taught", "resnet8", 0.9), ("peer", "resnet8", 0.94), ("peer w4a4", "resnet8", 0.93),
    ]  # fmt: skip
    assert "ensemble of 2 teachers" in render_text(summarise(run))


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
    summary = summarise(run)
    text = render_text(summary, agents={NASTY: NASTY})
    page = render_page(summary, replace(record(), agents={NASTY: NASTY}, environment={NASTY: NASTY}))
    for made in (text, page):
        assert "<script" not in made and "<img" not in made
        assert "\x1b" not in made and "\\x1b[31m" in made.replace("\\[", "[").replace("\\\\", "\\")
    assert "[x](" not in text and "\n# head" not in text and text.startswith("# &lt;img src=x onerror=y&gt;\n")


SWAPS: list[Any] = [3, "x", [], {}, None, True, [1], {"a": []}]


@pytest.mark.parametrize("first", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(SWAPS)))])
def test_records_of_another_shape_are_named_with_their_place(
    tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value of every record is swapped for one of another type: read all the same, or refused in words."""
    for where, name in ((page_module, "line_chart"), (page_module, "schedule_chart"), (tradeoff, "scatter_chart")):
        monkeypatch.setattr(where, name, drawn_once(getattr(where, name)))
    run = make_devices(make_run(tmp_path / "run"))
    seen = refused = 0
    for file in sorted(run.rglob("*.json")):
        whole = json.loads(file.read_text())
        for path in places(whole):
            write(file, replaced(whole, path, SWAPS[(first + seen) % len(SWAPS)]))
            seen += 1
            try:
                summary = summarise(run)
                render_text(summary)
                render_page(summary, record())
                summary.to_text()
            except DamagedFileError as error:
                refused += 1
                assert str(file) in str(error) and "restore it" in str(error)
        write(file, whole)
    assert seen > 100 and refused > seen // 4


def drawn_once(draw: Callable[..., str]) -> Callable[..., str]:
    """Draw what was drawn before only once: most swaps change no picture."""
    known: dict[str, str] = {}

    def drawn_or_known(*args: Any, **options: Any) -> str:
        key = repr((args, options))
        if key not in known:
            known[key] = draw(*args, **options)
        return known[key]

    return drawn_or_known


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places(one, (*at, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy
