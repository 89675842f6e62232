"""Draw curves, ranges and schedules as inline SVG that follows the page's light or dark colors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from qkd.report.drawing import CURVES, Picture, clean, dot, drawing, name_ends, new_figure, note, panel, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 460, 240  # pixels, like everything below
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 34, 36
LINE, LETTER, HANDLE = 14, 6.4, 36  # of a legend: height of a line, width of a letter, width of everything else
LOWEST_LABEL = 4  # of a scatter chart, above the lower edge
ROW, NAMES = 16, 150  # of a schedule: height of a row, width of the names


@dataclass(frozen=True)
class Series:
    """A curve.

    Args:
        label: Shown in the legend.
        points: ``(x, y)`` pairs with increasing ``x``; non-finite points are left out.
        color: Index into the page's colors.
        is_dashed: Whether it is dashed, e.g. to distinguish validation from training.
    """

    label: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    is_dashed: bool = False

    def finite(self) -> list[tuple[float, float]]:
        """Return the points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Point:
    """A labeled point of a scatter chart; ``color`` is an index into the page's colors."""

    label: str
    x: float
    y: float
    color: int = 0


def line_chart(title: str, series: Sequence[Series], *, x_label: str, percent: bool = False) -> Markup:
    """Return an SVG element with axes, a legend and one curve per series; a note if there is nothing to draw.

    Args:
        title: Heading of the chart.
        series: The curves.
        x_label: What the horizontal axis counts.
        percent: Whether values are fractions to label in percent.
    """
    drawn = [(one, points) for one in series if (points := one.finite())]
    if not drawn:
        return _empty(title, "nothing was recorded")
    columns = max(1, int((WIDTH - LEFT) // (HANDLE + LETTER * max(len(one.label) for one, _ in drawn))))
    with drawing():
        from matplotlib.ticker import MaxNLocator

        more = LINE * (math.ceil(len(drawn) / columns) - 1)
        figure, axes = _axes(title, x_label, percent=percent, top=TOP + more)
        axes.margins(0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))  # epochs and steps are whole numbers
        for one, points in drawn:
            _curve(axes, one, points)
        names = [shortened(one.label, WIDTH - LEFT - HANDLE) for one, _ in drawn]
        axes.legend(axes.lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, handlelength=1.6)
        return Picture(title, figure).inline()


def scatter_chart(title: str, points: Sequence[Point], *, x_label: str, percent: bool = False) -> Markup:
    """Return an SVG element with a labeled dot per point; a note if there is nothing to draw.

    Args:
        title: Heading of the chart.
        points: The points to draw; non-finite ones are left out.
        x_label: What the horizontal axis measures, with its unit; it starts at zero.
        percent: Whether vertical values are fractions to label in percent.
    """
    drawn = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not drawn:
        return _empty(title, "nothing was recorded")
    with drawing():
        figure, axes = _axes(title, x_label, percent=percent)
        axes.plot([point.x for point in drawn], [point.y for point in drawn], linestyle="none")  # sets the range
        axes.margins(y=0.08)
        axes.autoscale_view()
        axes.set_xlim(0, 1.05 * max(point.x for point in drawn) or 1.0)
        lowest = math.inf
        for point in sorted(drawn, key=lambda point: -point.y):
            value = f"{100 * point.y:.4g} %" if percent else f"{point.y:.4g}"
            dot(axes, point.x, point.y, 4, point.color, f"{point.label}: {point.x:.4g}, {value}")
            lowest = _label(axes, point, lowest)
        return Picture(title, figure).inline()


def histogram_chart(title: str, counts: Sequence[int], *, x_label: str, color: int = 0) -> Markup:
    """Return an SVG element with a bar for each whole number from 0; a note if nothing was counted.

    Args:
        title: Heading of the chart.
        counts: How often each number occurred. All bars share one outline, since there may be thousands.
        x_label: What the numbers are.
        color: Index into the page's colors.
    """
    if not any(counts):
        return _empty(title, "nothing was counted")
    with drawing():
        from matplotlib.ticker import MaxNLocator

        figure, axes = _axes(title, x_label, percent=False)
        edges = [number - 0.5 for number in range(len(counts) + 1)]
        bars = axes.stairs(counts, edges, fill=True, facecolor=CURVES[color % len(CURVES)])
        note(bars, f"{len(counts)} numbers, {min(counts):,} to {max(counts):,} times each")
        axes.set_xlim(edges[0], edges[-1])
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        return Picture(title, figure).inline()


def schedule_chart(
    title: str, strengths: Mapping[str, Sequence[float]], *, column_label: str = "epoch", color: int = 0
) -> Markup:
    """Return an SVG element that shows how strongly each operation acts over the epochs.

    Args:
        title: Heading of the chart.
        strengths: Operation -> strength in 0..1 for each column; all rows have the same length.
        column_label: What the columns count.
        color: Index into the page's colors.
    """
    columns = max((len(row) for row in strengths.values()), default=0)
    if not columns:
        return _empty(title, "no operation of a schedule")
    with drawing():
        figure = new_figure(WIDTH, TOP - 8 + ROW * len(strengths) + 22)
        _heading(figure, title)
        axes = panel(figure, NAMES, TOP - 8, WIDTH - NAMES - RIGHT, ROW * len(strengths))
        axes.set_ylim(len(strengths), 0)
        axes.set_yticks(
            [index + 0.5 for index in range(len(strengths))], [shortened(name, NAMES) for name in strengths]
        )
        name_ends(axes, (0, columns), ("1", f"{column_label} {columns}"))
        for index, (name, row) in enumerate(strengths.items()):
            start = 0
            for value, run in itertools.groupby(row):
                end = start + len(list(run))
                if value > 0:
                    shade = min(1.0, max(0.05, value))
                    (bar,) = axes.barh(
                        index + 0.5, end - start, 0.88, left=start, color=CURVES[color % len(CURVES)], alpha=shade
                    )
                    note(bar, f"{name}, {column_label} {start + 1}-{end}: {value:.3f}")
                start = end
        return Picture(title, figure).inline()


def _heading(figure: Figure, title: str) -> None:
    size = min(12.0, max(6.0, WIDTH / 0.7 / max(1, len(title))))  # a bold letter's width is up to 0.7 of its height
    most = int(WIDTH / 0.7 / size)
    words = title if len(title) <= most else f"{title[: most - 1]}\N{HORIZONTAL ELLIPSIS}"
    write(figure, WIDTH / 2, 13, words, ha="center", weight="bold", size=size)


def _axes(title: str, x_label: str, *, percent: bool, top: float = TOP) -> tuple[Figure, Axes]:
    figure = new_figure(WIDTH, HEIGHT + top - TOP)
    _heading(figure, title)
    axes = panel(figure, LEFT, top, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    axes.set_xlabel(clean(x_label))
    axes.grid(axis="y")
    axes.locator_params(nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %" if percent else f"{value:.4g}")
    return figure, axes


def _curve(axes: Axes, series: Series, points: Sequence[tuple[float, float]]) -> None:
    color, style = CURVES[series.color % len(CURVES)], "--" if series.is_dashed else "-"
    (line,) = axes.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.8)
    note(line, series.label)
    if len(points) == 1:
        dot(axes, *points[0], 3, series.color, series.label)


def _label(axes: Axes, point: Point, lowest: float) -> float:
    """Write a point's label at least a line below the one at height ``lowest``; return its height, in pixels."""
    x, y = axes.transData.transform((point.x, point.y))
    height = min(y - 4, lowest - 12)
    if height < LOWEST_LABEL:  # no room below the others; the dot's tooltip shows it
        return lowest
    is_right = x > (LEFT + WIDTH) / 2
    place, side = (-8 if is_right else 8, height - y), "right" if is_right else "left"
    words = shortened(point.label, (x if is_right else WIDTH - x) - 2 * 8)
    axes.annotate(words, (point.x, point.y), place, textcoords="offset points", ha=side, va="baseline",
                  annotation_clip=False)  # fmt: skip
    return float(height)


def shortened(text: str, pixels: float) -> str:
    """Return text that fits into a number of pixels as a label, ending in an ellipsis if it is too long."""
    line, most = clean(text), max(2, int(pixels / LETTER))
    return line if len(line) <= most else f"{line[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _empty(title: str, why: str) -> Markup:
    return Markup('<p class="empty">{}: {}</p>').format(title, why)
