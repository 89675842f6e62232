"""Draw what a teacher conveys: its confidence, how classes relate, how gradients are rescaled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qkd.report.drawing import AXIS, Picture, drawing, name_ends, new_figure, note, panel, write
from qkd.report.stacks import LEFT, PANEL, RIGHT, TOP, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HALF = (WIDTH - LEFT) // 2
GAP = 46
COLORS = ("#2a5cb3", "#e8a21a")  # of the two temperatures
BAND, MEAN, TOTAL = "#8fbcf0", "#1f4e9c", "#d94f2b"
POSITIVE, NEGATIVE, DIAGONAL = "#d94f2b", "#1f4e9c", "#8c8c8c"
MOST_NOTED_CLASSES = 32  # with more, the tooltips of all pairs would be most of the file


def teacher_picture(
    title: str,
    *,
    confidences: Mapping[str, Sequence[int]],
    relations: Sequence[Sequence[float]],
    relations_label: str,
    classes: Sequence[str],
    rescaling: Sequence[Mapping[str, float | None]] = (),
) -> Picture:
    """Return the picture of a diagnosis.

    Args:
        title: Heading.
        confidences: One or two labels -> images in each of equal bins of the true class's probability, 0 to 1.
        relations: Correlation of each pair of classes, in ``[-1, 1]``.
        relations_label: Their description, in a few words.
        classes: Class names, in the order of ``relations``.
        rescaling: For each epoch ``epoch``, ``w_mean``, ``w_std`` and ``w_total``, the last three possibly None;
            not drawn if empty.
    """
    row = PANEL + GAP
    with drawing():
        figure = new_figure(WIDTH, TOP + row * (2 if rescaling else 1))
        write(figure, LEFT, 14, title)
        write(figure, LEFT, TOP - 5, "probability of the true class, share of the images")
        _histogram(panel(figure, LEFT, TOP, HALF - 20, PANEL), confidences)
        left = LEFT + HALF + 20
        write(figure, left, TOP - 5, f"how classes correlate, {relations_label}")
        most = _heat_map(panel(figure, left, TOP, PANEL, PANEL), relations, classes)
        write(figure, left, TOP + PANEL + 14, f"blue -{most:.2g}, white 0, red {most:.2g}")
        if rescaling:
            words = "gradient re-scaling w_t over the epochs: blue mean and std, red of all gradients"
            write(figure, LEFT, TOP + row - 5, words)
            _over_epochs(panel(figure, LEFT, TOP + row, WIDTH - LEFT - RIGHT, PANEL), rescaling)
    return Picture(title, figure)


def _histogram(axes: Axes, confidences: Mapping[str, Sequence[int]]) -> None:
    from matplotlib.patches import Patch

    for index, (label, counts) in enumerate(confidences.items()):
        total, slot = max(sum(counts), 1), 1 / max(len(counts), 1)
        thin = slot / len(confidences)
        for place, count in enumerate(counts):
            if count:
                left = place * slot + index * thin
                (bar,) = axes.bar(left, count / total, thin, align="edge", color=COLORS[index])
                note(bar, f"{label}, {place / len(counts):.2f} to {(place + 1) / len(counts):.2f}: {count} images")
    handles = [Patch(color=color, label=label) for color, label in zip(COLORS, confidences, strict=False)]
    axes.legend(handles=handles, loc="upper left", handlelength=1, handleheight=1)
    axes.set_ylim(0, PANEL / (PANEL - 20))
    axes.set_yticks([])
    axes.axhline(0, color=AXIS, linewidth=1)
    name_ends(axes, (0, 1), ("0", "1"))


def _heat_map(axes: Axes, relations: Sequence[Sequence[float]], classes: Sequence[str]) -> float:
    """Draw correlations, blue to red; return the largest between different classes, which gets the full color."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgba
    from matplotlib.patches import Rectangle

    axes.set_axis_off()
    values = np.array(relations, dtype=float).reshape(len(relations), -1)
    count = len(values)
    apart = values[~np.eye(count, dtype=bool) & np.isfinite(values)] if count else values
    most = float(np.abs(apart).max(initial=0.0)) or 1.0
    shades = LinearSegmentedColormap.from_list("signs", [NEGATIVE, "white", POSITIVE], N=257)  # odd: 0 is white
    colors = shades((np.nan_to_num(values / most, posinf=0.0, neginf=0.0) + 1) / 2)
    colors[np.arange(count), np.arange(count)] = to_rgba(DIAGONAL)
    if count > MOST_NOTED_CLASSES:
        axes.imshow(colors, interpolation="none", aspect="auto")
        return most
    axes.set(xlim=(0, count or 1), ylim=(count or 1, 0))
    for row, column in np.ndindex(count, count):
        cell = Rectangle((column, row), 1, 1, facecolor=to_hex(colors[row, column]))
        note(cell, f"{classes[row]}, {classes[column]}: {values[row, column]:.3f}")
        axes.add_patch(cell)
    return most


def _over_epochs(axes: Axes, rows: Sequence[Mapping[str, float | None]]) -> None:
    bands = [_band(row) for row in rows]
    values = [0.0, 1.0, *(value for band in bands for value in band.values())]
    for value in (0.0, 1.0):
        note(axes.axhline(value, color=AXIS, linewidth=1), f"w_t = {value:g}")
    for x, (row, band) in enumerate(zip(rows, bands, strict=True)):
        words = f"epoch {row['epoch']:.0f}: " + ", ".join(f"{name} {value:.3f}" for name, value in band.items())
        if "mean" in band:
            low, high = band["mean less std"], band["mean and std"]
            (bar,) = axes.bar(x, high - low, 0.9, low, align="edge", color=BAND)
            note(bar, words)
        for name, color in (("mean", MEAN), ("total", TOTAL)):
            if name in band:
                (line,) = axes.plot([x, x + 0.9], [band[name]] * 2, color=color, linewidth=2)
                note(line, words)
    axes.set_ylim(min(values), max(values))
    axes.set_yticks(sorted({0.0, 1.0, min(values), max(values)}))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    name_ends(axes, (0, len(rows)), (f"epoch {rows[0]['epoch']:.0f}", f"{rows[-1]['epoch']:.0f}"))


def _band(row: Mapping[str, float | None]) -> dict[str, float]:
    """Return what is drawn for an epoch, in the order of its note."""
    mean, std, total = (row[name] for name in ("w_mean", "w_std", "w_total"))
    band = {}
    if mean is not None and std is not None:
        band = {"mean": mean, "mean less std": mean - std, "mean and std": mean + std}
    return band if total is None else {**band, "total": total}
