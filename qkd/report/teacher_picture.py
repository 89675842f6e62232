"""Draw what a teacher tells: how sure it is, how classes relate, how gradients are re-scaled; as SVG or PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qkd.report.stacks import LEFT, PANEL, TOP, WIDTH, Bar, Picture, Words

HALF = (WIDTH - LEFT) // 2
GAP = 46
COLOURS = ("#1f4e9c", "#e8a21a")  # of the two temperatures
BAND, MEAN, TOTAL, RULE = "#8fbcf0", "#1f4e9c", "#d94f2b", "#888888"
POSITIVE, NEGATIVE, DIAGONAL = (0xD9, 0x4F, 0x2B), (0x1F, 0x4E, 0x9C), "#8c8c8c"
MOST_NOTED_CLASSES = 32  # a title for each pair of more would be most of the file


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
        relations: Correlation of each two classes, in ``[-1, 1]``.
        relations_label: What they are, in a few words.
        classes: Names, in the order of ``relations``.
        rescaling: For each epoch ``epoch``, ``w_mean``, ``w_std`` and ``w_total``, the last three possibly None;
            empty: not drawn.
    """
    bars, words = [], [Words(LEFT, 14, title)]
    for part in (_histogram(confidences), _heat_map(relations, relations_label, classes)):
        bars += part[0]
        words += part[1]
    height = TOP + PANEL + GAP
    if rescaling:
        more_bars, more_words = _over_epochs(rescaling, height)
        bars += more_bars
        words += more_words
        height += PANEL + GAP
    return Picture(title, height, tuple(bars), tuple(words))


def _histogram(confidences: Mapping[str, Sequence[int]]) -> tuple[list[Bar], list[Words]]:
    base, width = TOP + PANEL, HALF - 20
    bars = [Bar(LEFT, base, width, 1, RULE, "images")]
    words = [Words(LEFT, TOP - 5, "probability of the true class, share of the images")]
    for index, (label, counts) in enumerate(confidences.items()):
        total, slot = max(sum(counts), 1), width / max(len(counts), 1)
        thin = slot / len(confidences)
        for place, count in enumerate(counts):
            note = f"{label}, {place / len(counts):.2f} to {(place + 1) / len(counts):.2f}: {count} images"
            high = count / total * (PANEL - 20)
            if count:
                bars.append(Bar(LEFT + place * slot + index * thin, base - high, thin, high, COLOURS[index], note))
        bars.append(Bar(LEFT + 6, TOP + 6 + 15 * index, 10, 10, COLOURS[index], label))
        words.append(Words(LEFT + 21, TOP + 15 + 15 * index, label))
    words += [Words(LEFT, base + 14, "0"), Words(LEFT + width, base + 14, "1", ends_there=True)]
    return bars, words


def _heat_map(
    relations: Sequence[Sequence[float]], label: str, classes: Sequence[str]
) -> tuple[list[Bar], list[Words]]:
    count = len(relations)
    left, cell = LEFT + HALF + 20, PANEL / max(count, 1)
    apart = [abs(value) for row, line in enumerate(relations) for column, value in enumerate(line) if row != column]
    most = max([value for value in apart if math.isfinite(value)], default=0.0) or 1.0
    bars = []
    for row, line in enumerate(relations):
        for column, value in enumerate(line):
            note = f"{classes[row]}, {classes[column]}: {value:.3f}" if count <= MOST_NOTED_CLASSES else ""
            colour = DIAGONAL if row == column else _shade(value / most)
            bars.append(Bar(left + column * cell, TOP + row * cell, cell, cell, colour, note))
    words = [Words(left, TOP - 5, f"how classes correlate, {label}")]
    words.append(Words(left, TOP + PANEL + 14, f"blue -{most:.2g}, white 0, red {most:.2g}"))
    return bars, words


def _over_epochs(rows: Sequence[Mapping[str, float | None]], top: int) -> tuple[list[Bar], list[Words]]:
    width = WIDTH - 10 - LEFT
    bands = [_band(row) for row in rows]
    values = [0.0, 1.0, *(value for band in bands for value in band.values())]
    low, high = min(values), max(values)

    def at(value: float) -> float:
        return top + PANEL - (value - low) / (high - low) * PANEL

    slot = width / len(rows)
    bars = [Bar(LEFT, at(value), width, 1, RULE, f"w_t = {value:g}") for value in (0.0, 1.0)]
    for index, (row, band) in enumerate(zip(rows, bands, strict=True)):
        x, thick = LEFT + index * slot, 0.9 * slot
        note = f"epoch {row['epoch']:.0f}: " + ", ".join(f"{name} {value:.3f}" for name, value in band.items())
        if "mean" in band:
            height = max(at(band["mean less std"]) - at(band["mean and std"]), 1.0)
            bars.append(Bar(x, at(band["mean and std"]), thick, height, BAND, note))
        bars += [Bar(x, at(band[name]) - 1, thick, 2, colour, note)
                 for name, colour in (("mean", MEAN), ("total", TOTAL)) if name in band]  # fmt: skip
    words = [Words(LEFT, top - 5, "gradient re-scaling w_t over the epochs: blue mean and std, red of all gradients")]
    ends = [value for value in (low, high) if value not in (0.0, 1.0)]
    words += [Words(LEFT - 5, at(value) + 4, f"{value:.3g}", ends_there=True) for value in (0.0, 1.0, *ends)]
    words.append(Words(LEFT, top + PANEL + 14, f"epoch {rows[0]['epoch']:.0f}"))
    words.append(Words(LEFT + width, top + PANEL + 14, f"{rows[-1]['epoch']:.0f}", ends_there=True))
    return bars, words


def _band(row: Mapping[str, float | None]) -> dict[str, float]:
    """Return what is drawn of an epoch, in the order of its note."""
    mean, std, total = (row[name] for name in ("w_mean", "w_std", "w_total"))
    band = {}
    if mean is not None and std is not None:
        band = {"mean": mean, "mean less std": mean - std, "mean and std": mean + std}
    return band if total is None else {**band, "total": total}


def _shade(share: float) -> str:
    """Return white for 0, full red for 1, full blue for -1."""
    share = max(-1.0, min(1.0, share)) if math.isfinite(share) else 0.0
    end = POSITIVE if share > 0 else NEGATIVE
    return "#" + "".join(f"{round(255 + (value - 255) * abs(share)):02x}" for value in end)
