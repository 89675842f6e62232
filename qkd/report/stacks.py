"""Draw a schedule: probability and magnitude of every operation, stacked over the epochs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qkd.agents import PBA_OPERATIONS, Op, Schedule
from qkd.report.drawing import AXIS, Picture, drawing, name_ends, new_figure, note, panel, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP, LINE = 720, 190, 44, 10, 34, 40, 16  # pixels
LEGEND_COLUMNS = 5
# One color per operation: geometric ones blue and green, point operations warm, the rest gray and brown; none is so
# dark that it disappears on a dark page.
COLORS = dict(
    zip(
        PBA_OPERATIONS,
        (
            "#2a5cb3", "#3f83d6", "#8fbcf0", "#e8a21a", "#b5651d", "#5a6675", "#8c8c8c", "#d94f2b", "#1d7a46",
            "#f2c94c", "#66b88a", "#a83279", "#e27fb5", "#7d5a4c", "#7e3fb5",
        ),
        strict=True,
    )
)  # fmt: skip


def schedule_picture(title: str, schedule: Schedule) -> Picture:
    """Return the picture of a schedule: probabilities at the top, magnitudes of operations that can fire below.

    If a policy holds an operation twice, the sum of both is shown.

    Args:
        title: Heading.
        schedule: The schedule, drawn over its own epochs.
    """
    names = [name for name in PBA_OPERATIONS if any(_of(segment.policy.ops, name) for segment in schedule.segments)]
    legend = TOP + 2 * (PANEL + GAP)
    with drawing():
        from matplotlib.patches import Patch

        figure = new_figure(WIDTH, legend + -(-len(names) // LEGEND_COLUMNS) * LINE)
        write(figure, LEFT, 14, title)
        for top, label in ((TOP, "probability"), (TOP + PANEL + GAP, "magnitude")):
            write(figure, LEFT, top - 5, f"{label}, stacked")
            _stack(panel(figure, LEFT, top, WIDTH - LEFT - RIGHT, PANEL), schedule, names, label)
        figure.legend([Patch(color=COLORS[name]) for name in names], names, loc="lower left", ncols=LEGEND_COLUMNS,
                      bbox_to_anchor=(LEFT / WIDTH, 0), handlelength=1, handleheight=1, columnspacing=3)  # fmt: skip
        if not names:
            write(figure, LEFT + 10, TOP + PANEL / 2, "no operation in any epoch")
    return Picture(title, figure)


def _stack(axes: Axes, schedule: Schedule, names: Sequence[str], label: str) -> None:
    lengths = [segment.epochs for segment in schedule.segments]
    starts = [0, *itertools.accumulate(lengths)][:-1]
    bases = [0.0] * len(starts)
    axes.axhline(0, color=AXIS, linewidth=1)
    for name in names:
        heights = [_height(segment.policy.ops, name, label) for segment in schedule.segments]
        bars = axes.bar(starts, heights, lengths, bases, align="edge", color=COLORS[name])
        for bar, start, length, height in zip(bars, starts, lengths, heights, strict=True):
            note(bar, f"{name}, epochs {start + 1} to {start + length}: {label} {height:.3g}")
        bases = [base + height for base, height in zip(bases, heights, strict=True)]
    most = max(bases, default=0.0)
    axes.set_ylim(0, most or 1.0)
    axes.set_yticks([0, most] if most else [0])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    name_ends(axes, (0, schedule.epochs), ("epoch 1", str(schedule.epochs)))


def _of(ops: Sequence[Op], name: str) -> list[Op]:
    return [op for op in ops if op.name == name and op.probability > 0]


def _height(ops: Sequence[Op], name: str, label: str) -> float:
    return sum(op.probability if label == "probability" else op.magnitude for op in _of(ops, name))
