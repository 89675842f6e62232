"""The pictures of a report: drawn where their values are, whatever they are called."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import beside
import matplotlib
import pytest

from qkd.report import render_page, summarize
from qkd.report.charts import LEFT, Point, Series, line_chart, scatter_chart, schedule_chart
from qkd.report.drawing import CURVES, INK, RULE, clean
from qkd.report.page import RunRecord
from qkd.report.stacks import COLORS as STACKED
from qkd.report.tradeoff import device_charts

_files = beside.load(Path(__file__).with_name("run_files.py"))
EVIL: str = _files.EVIL
make_devices: Callable[[Path], Path] = _files.make_devices
make_run: Callable[..., Path] = _files.make_run
record: Callable[[], RunRecord] = _files.record


def test_every_chart_is_well_formed(tmp_path: Path) -> None:
    text = render_page(summarize(make_run(tmp_path / "run")), record())
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 8
    for chart in charts:
        ElementTree.fromstring(chart)


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
    for pictures in device_charts(summarize(make_devices(make_run(tmp_path / "run")))).values():
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


def test_the_same_run_is_the_same_page_whatever_the_settings_of_matplotlib(tmp_path: Path) -> None:
    summary = summarize(make_run(tmp_path / "run"))
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
    files = sorted((Path(__file__).parents[3] / "qkd").rglob("*.py"))
    texts = {file.name: text for file in files if re.search("matplotlib|jinja2", text := file.read_text("utf-8"))}
    assert {"charts.py", "drawing.py", "page.py"} <= set(texts)
    for name, text in texts.items():
        tops = [ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [line for line in tops if "matplotlib" in line or "jinja2" in line], name
        assert "import pyplot" not in text and "matplotlib.pyplot" not in text
