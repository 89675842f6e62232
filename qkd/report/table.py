"""Align figures in columns of text, or as a Markdown table."""

from __future__ import annotations

import re
from collections.abc import Sequence

from qkd.foreign.shown import shown, shown_line
from qkd.units import bytes_text, megabytes, milliseconds, percent

__all__ = ["align", "bytes_text", "markdown", "megabytes", "milliseconds", "percent", "plain_text"]

_LONGEST_CELL = 200  # characters
_MARKS = re.compile(r"[\\`*|\[\]~]")  # an underscore within a word is none, and names are full of them


def align(rows: Sequence[Sequence[str]]) -> str:
    r"""Return rows as columns of text; the first two to the left, figures to the right.

    A row is one line, also where a name that comes from outside is none: its newlines are written out (``\n``).
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
    r"""Return text as Markdown shows it: no tag, link, code or table cell of it comes to life.

    Names of files, classes and devices come from outside. Control characters are written out (``\x1b``).
    """
    line = shown(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKS.sub(r"\\\g<0>", line)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table; the first row is the heading. Cells are escaped."""
    escaped = [[plain_text(cell) for cell in row] for row in rows]
    head, *body = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])
