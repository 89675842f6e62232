"""Align figures in columns of text, or format them as a Markdown table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from qkd.foreign.shown import shown, shown_line
from qkd.units import counted, megabytes, milliseconds, percent

_LONGEST_CELL = 200  # characters
# an underscore within a word is no markup, and names are full of them
_MARKS = re.compile(r"[\\`*|\[\]~]|_(?![^\W_])|(?<![^\W_])_")


DEVICE_HEAD = ["device", "model", "median", "p10", "p90", "p99", "vs. FP32", "size", "memory", "accuracy", "agreement"]


def device_label(name: str, *, is_reference: bool) -> str:
    """Return a model's name in a table, followed by ``(FP32)`` if it is the reference of the ratios."""
    return f"{name} (FP32)" if is_reference else name


def device_cells(row: Mapping[str, Any], ratio: float | None) -> list[str]:
    """Return a device's measurements of a model as text, for the columns of ``DEVICE_HEAD`` after the first two.

    Args:
        row: The model's entry of ``bench/<device>.json``.
        ratio: Its median divided by the float model's; None if there is none.
    """
    return [
        *(milliseconds(row.get(key)) for key in ("median_ms", "p10_ms", "p90_ms", "p99_ms")),
        "-" if ratio is None else f"{ratio:.3f}",
        megabytes(row.get("size_bytes")),
        megabytes(row.get("peak_memory_bytes")),
        percent(row.get("accuracy")),
        percent(row.get("agreement")),
    ]


def device_notes(row: Mapping[str, Any]) -> list[str]:
    """Return notes on a model that a device measured; ``row`` as for :func:`device_cells`."""
    repacked = [f"weights repacked to {', '.join(row['repacked'])}"] if row.get("repacked") else []
    return [*repacked, *row.get("notes", [])]


def settings_text(row: Mapping[str, Any]) -> str:
    """Return with which threads, batch and rounds a model was measured.

    Args:
        row: As for :func:`device_cells`, with what its device shares among all models.
    """
    shape, threads = row.get("input_shape") or [1], row.get("threads", 1)
    pinned = f" on CPUs {', '.join(map(str, row['affinity']))}" if row.get("affinity") else ""
    return (
        f"Times are for a batch of {counted(shape[0], 'image')}, with {counted(threads, 'thread')}{pinned}: "
        f"{counted(row.get('rounds', '?'), 'round')}, after {row.get('warmup')} for warm-up"
    )


def align(rows: Sequence[Sequence[str]]) -> str:
    r"""Return rows as columns of text; the first two are left-aligned, figures right-aligned.

    A row is one line even if a name from outside has several: its newlines are written out (``\n``).
    """
    rows = [[shown_line(cell, _LONGEST_CELL) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if index < 2 else cell.rjust(width)
                 for index, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def plain_text(text: str) -> str:
    r"""Escape text for Markdown, so that none of it becomes a tag, link, code or table cell.

    Names of files, classes and devices come from outside. Control characters are written out (``\x1b``).
    """
    line = shown(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\g<0>", line)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first row is the heading. Cells are escaped."""
    escaped = [[plain_text(cell) for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
