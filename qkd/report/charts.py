"""Draw curves, ranges and schedules as inline SVG that follows the page's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 36
COLOURS = ("var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)")


@dataclass(frozen=True)
class Series:
    """A curve.

    Args:
        label: Shown in the legend.
        points: ``(x, y)`` pairs with rising ``x``; points that are not finite are left out.
        colour: Index into the page's colours.
        is_dashed: Drawn dashed, to tell e.g. validation from training.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    is_dashed: bool = False

    def finite(self) -> list[tuple[float, float]]:
        """Return the points that can be drawn."""
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


def line_chart(title: str, series: Sequence[Series], *, x_label: str, percent: bool = False) -> str:
    """Return an SVG element with axes, a legend and one polyline a series; a note where there is nothing to draw.

    Args:
        title: Heading of the chart.
        series: The curves.
        x_label: What the horizontal axis counts.
        percent: Whether values are fractions to be labelled in percent.
    """
    drawn = [(one, one.finite()) for one in series if one.finite()]
    if not drawn:
        return f'<p class="empty">{escape(title)}: nothing was recorded</p>'
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    x_axis, y_axis = _Axis.around(xs, LEFT, WIDTH - RIGHT), _Axis.around(ys, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x_axis, y_axis, x_label=x_label, percent=percent)]
    parts += [_curve(one, points, x_axis, y_axis) for one, points in drawn]
    parts.append(_legend([one for one, _ in drawn]))
    return _svg(title, WIDTH, HEIGHT, "".join(parts))


@dataclass(frozen=True)
class Point:
    """A labelled point of a scatter chart."""

    label: str
    x: float
    y: float


def scatter_chart(title: str, points: Sequence[Point], *, x_label: str, percent: bool = False) -> str:
    """Return an SVG element with a labelled dot for each point; a note where there is nothing to draw.

    Args:
        title: Heading of the chart.
        points: What is drawn; points that are not finite are left out.
        x_label: What the horizontal axis measures, with its unit; it starts at zero.
        percent: Whether vertical values are fractions to be labelled in percent.
    """
    drawn = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not drawn:
        return f'<p class="empty">{escape(title)}: nothing was recorded</p>'
    x_axis = _Axis.around([0.0, 1.05 * max(point.x for point in drawn)], LEFT, WIDTH - RIGHT)
    y_axis = _Axis.around([point.y for point in drawn], HEIGHT - BOTTOM - 8, TOP + 8)
    parts = [_grid(x_axis, y_axis, x_label=x_label, percent=percent, whole=False)]
    heights: list[float] = []
    for index, point in enumerate(sorted(drawn, key=lambda point: -point.y)):
        parts.append(_dot(point, index, x_axis, y_axis, heights, percent=percent))
    return _svg(title, WIDTH, HEIGHT, "".join(parts))


def _dot(point: Point, colour: int, x_axis: _Axis, y_axis: _Axis, heights: list[float], *, percent: bool) -> str:
    """Return a dot and its label; labels keep a line's distance from those above (``heights``)."""
    x, y = x_axis.at(point.x), y_axis.at(point.y)
    line = 12.0  # pixels at 11 px letters
    height = max(y + 4, heights[-1] + line if heights else 0.0)
    heights.append(height)
    is_right = x > (LEFT + WIDTH) / 2
    place = f'x="{x - 8:.1f}" class="end"' if is_right else f'x="{x + 8:.1f}"'
    value = f"{100 * point.y:.4g} %" if percent else f"{point.y:.4g}"
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[colour % len(COLOURS)]}">'
        f"<title>{escape(point.label)}: {point.x:.4g}, {value}</title></circle>"
        f'<text {place} y="{height:.1f}">{escape(point.label)}</text>'
    )


def schedule_chart(title: str, strengths: Mapping[str, Sequence[float]], *, column_label: str = "epoch") -> str:
    """Return an SVG element that shows how strongly each operation acts over the epochs.

    Args:
        title: Heading of the chart.
        strengths: Operation -> strength in 0..1 for each column; every row of one length.
        column_label: What the columns count.
    """
    columns = max((len(row) for row in strengths.values()), default=0)
    if not columns:
        return f'<p class="empty">{escape(title)}: no operation of a schedule</p>'
    row_height, left = 16, 150
    cell = (WIDTH - left - RIGHT) / columns
    parts = []
    for index, (name, row) in enumerate(strengths.items()):
        y = TOP + index * row_height
        parts.append(f'<text x="{left - 6}" y="{y + 12}" class="end">{escape(name)}</text>')
        parts += [
            f'<rect x="{left + start * cell:.2f}" y="{y}" width="{(end - start) * cell:.2f}" height="{row_height - 2}" '
            f'class="cell" fill-opacity="{_clamp(value):.3f}"><title>{escape(name)}, {escape(column_label)} '
            f"{start + 1}-{end}: {value:.3f}</title></rect>"
            for start, end, value in _stretches(row)
        ]
    bottom = TOP + len(strengths) * row_height
    parts.append(f'<text x="{left}" y="{bottom + 14}">1</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{bottom + 14}" class="end">{escape(column_label)} {columns}</text>')
    return _svg(title, WIDTH, bottom + 22, "".join(parts))


@dataclass(frozen=True)
class _Axis:
    """Maps values to pixels and knows its round tick values."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> _Axis:
        low, high = min(values), max(values)
        if high - low < 1e-9 * max(1.0, abs(high)):  # one value only: give it some room
            room = abs(high) * 0.05 or 0.5
            low, high = low - room, high + room
        return cls(low, high, start, end)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        raw = (self.high - self.low) / 4
        power = 10 ** math.floor(math.log10(raw))
        step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(x_axis: _Axis, y_axis: _Axis, *, x_label: str, percent: bool, whole: bool = True) -> str:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.at(value)
        label = f"{100 * value:.4g} %" if percent else f"{value:.4g}"
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{label}</text>')
    for value in x_axis.ticks():
        if value == round(value) or not whole:  # epochs and steps are whole
            parts.append(f'<text x="{x_axis.at(value):.1f}" y="{HEIGHT - BOTTOM + 16}" class="mid">{value:.4g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" class="mid">{escape(x_label)}</text>')
    return "".join(parts)


def _curve(series: Series, points: Sequence[tuple[float, float]], x_axis: _Axis, y_axis: _Axis) -> str:
    style = f'stroke="{COLOURS[series.colour % len(COLOURS)]}"' + (
        ' stroke-dasharray="5 3"' if series.is_dashed else ""
    )
    if len(points) == 1:
        x, y = points[0]
        return f'<circle cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3" class="curve" {style}/>'
    path = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
    return f'<polyline points="{path}" class="curve" {style}/>'


def _legend(series: Sequence[Series]) -> str:
    parts, x = [], float(LEFT)
    for one in series:
        dash = ' stroke-dasharray="5 3"' if one.is_dashed else ""
        colour = COLOURS[one.colour % len(COLOURS)]
        parts.append(f'<line x1="{x}" x2="{x + 18}" y1="24" y2="24" class="curve" stroke="{colour}"{dash}/>')
        parts.append(f'<text x="{x + 22}" y="28">{escape(one.label)}</text>')
        x += 34 + 6.2 * len(one.label)  # about the width of a letter at 11 px
    return "".join(parts)


def _stretches(row: Sequence[float]) -> list[tuple[int, int, float]]:
    """Return ``(start, end, value)`` of runs of equal, non-zero values."""
    found: list[tuple[int, int, float]] = []
    for index, value in enumerate(row):
        if found and found[-1][1] == index and found[-1][2] == value:
            found[-1] = (found[-1][0], index + 1, value)
        elif value > 0:
            found.append((index, index + 1, value))
    return found


def _clamp(value: float) -> float:
    return min(1.0, max(0.05, value))


def _svg(title: str, width: float, height: float, content: str) -> str:
    heading = f'<text x="{width / 2:.0f}" y="13" class="mid title">{escape(title)}</text>'
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{heading}{content}</svg>'
    )
