"""Draw a schedule: probability and magnitude of every operation, stacked over the epochs, as SVG or PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from qkd.agents import PBA_OPERATIONS, Op, Schedule

WIDTH, PANEL, LEFT, TOP, GAP, LINE = 720, 190, 44, 34, 40, 16  # pixels
LEGEND_COLUMNS = 5
# One colour an operation: geometric ones blue and green, point operations warm, the rest grey and brown.
COLOURS = dict(
    zip(
        PBA_OPERATIONS,
        (
            "#1f4e9c", "#3f83d6", "#8fbcf0", "#e8a21a", "#b5651d", "#2b2b2b", "#8c8c8c", "#d94f2b", "#1d7a46",
            "#f2c94c", "#66b88a", "#a83279", "#e27fb5", "#5c4033", "#7e3fb5",
        ),
        strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """A filled rectangle, in pixels from the top left corner; ``note`` is shown when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    note: str


@dataclass(frozen=True)
class Words:
    """A text whose base line begins (or ends) at a point, in pixels."""

    x: float
    y: float
    text: str
    ends_there: bool = False


@dataclass(frozen=True)
class Picture:
    """What is drawn, for either format."""

    title: str
    height: int
    bars: tuple[Bar, ...]
    words: tuple[Words, ...]

    def to_svg(self) -> str:
        """Return an SVG element; text takes the colour of the page around it."""
        bars = "".join(
            f'<rect x="{bar.x:.2f}" y="{bar.y:.2f}" width="{bar.width:.2f}" height="{bar.height:.2f}" '
            f'fill="{bar.colour}"><title>{escape(bar.note)}</title></rect>'
            for bar in self.bars
        )
        words = "".join(
            f'<text x="{one.x:.1f}" y="{one.y:.1f}" text-anchor="{"end" if one.ends_there else "start"}" '
            f'fill="currentColor">{escape(one.text)}</text>'
            for one in self.words
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" font-family="sans-serif" '
            f'font-size="11" role="img" aria-label="{escape(self.title)}">{bars}{words}</svg>'
        )

    def to_png(self, scale: int = 2) -> bytes:
        """Return a PNG file on white, ``scale`` pixels a pixel."""
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (WIDTH * scale, self.height * scale), "white")
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(11 * scale)
        for bar in self.bars:
            corner = (round(scale * bar.x), round(scale * bar.y))
            end = (round(scale * (bar.x + bar.width)) - 1, round(scale * (bar.y + bar.height)) - 1)
            if end[0] >= corner[0] and end[1] >= corner[1]:
                draw.rectangle((corner, end), fill=bar.colour)
        for one in self.words:
            anchor = "rs" if one.ends_there else "ls"
            draw.text((scale * one.x, scale * one.y), one.text, fill="black", font=font, anchor=anchor)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return buffer.getvalue()


def schedule_picture(title: str, schedule: Schedule) -> Picture:
    """Return the picture of a schedule: above, probabilities; below, magnitudes of operations that can fire.

    An operation that a policy holds twice counts with the sum of both.

    Args:
        title: Heading.
        schedule: What is drawn, over its own epochs.
    """
    bars, words = [], [Words(LEFT, 14, title)]
    names = [name for name in PBA_OPERATIONS if any(_of(segment.policy.ops, name) for segment in schedule.segments)]
    tops = (TOP, TOP + PANEL + GAP)
    for top, label in zip(tops, ("probability", "magnitude"), strict=True):
        columns = [[_height(segment.policy.ops, name, label) for name in names] for segment in schedule.segments]
        most = max([sum(column) for column in columns], default=0.0)
        bars += _panel(schedule, columns, names, top, most or 1.0, label)
        words.append(Words(LEFT, top - 5, f"{label}, stacked"))
        words += [Words(LEFT - 5, top + 9, f"{most:.3g}", ends_there=True)] if most else []
        words.append(Words(LEFT - 5, top + PANEL, "0", ends_there=True))
        words.append(Words(LEFT, top + PANEL + 13, "epoch 1"))
        words.append(Words(WIDTH - 10, top + PANEL + 13, str(schedule.epochs), ends_there=True))
    bottom = tops[1] + PANEL + GAP
    for index, name in enumerate(names):
        x = LEFT + index % LEGEND_COLUMNS * (WIDTH - LEFT) / LEGEND_COLUMNS
        y = bottom + index // LEGEND_COLUMNS * LINE
        bars.append(Bar(x, y - 9, 10, 10, COLOURS[name], name))
        words.append(Words(x + 15, y, name))
    if not names:
        words.append(Words(LEFT + 10, tops[0] + PANEL / 2, "no operation in any epoch"))
    lines = -(-len(names) // LEGEND_COLUMNS)
    return Picture(title, bottom + lines * LINE, tuple(bars), tuple(words))


def _panel(
    schedule: Schedule, columns: Sequence[Sequence[float]], names: Sequence[str], top: int, most: float, label: str
) -> list[Bar]:
    bars = [Bar(LEFT, top + PANEL, WIDTH - 10 - LEFT, 1, "#888888", label)]
    per_epoch = (WIDTH - 10 - LEFT) / schedule.epochs
    start = 0
    for segment, column in zip(schedule.segments, columns, strict=True):
        base = float(top + PANEL)
        for name, value in zip(names, column, strict=True):
            height = value / most * PANEL
            base -= height
            note = f"{name}, epochs {start + 1} to {start + segment.epochs}: {label} {value:.3g}"
            if value:
                bars.append(
                    Bar(LEFT + start * per_epoch, base, segment.epochs * per_epoch, height, COLOURS[name], note)
                )
        start += segment.epochs
    return bars


def _of(ops: Sequence[Op], name: str) -> list[Op]:
    return [op for op in ops if op.name == name and op.probability > 0]


def _height(ops: Sequence[Op], name: str, label: str) -> float:
    return sum(op.probability if label == "probability" else op.magnitude for op in _of(ops, name))
