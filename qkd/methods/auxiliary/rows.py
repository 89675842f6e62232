"""The row of an auxiliary teacher in a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd.methods.report_row import Row, row_of
from qkd.report.records import read_record


def auxiliary_rows(path: Path, results: Mapping[str, Mapping[str, Any]]) -> list[Row]:  # noqa: ARG001
    """Return the auxiliary's row.

    Args:
        path: The run folder.
        results: Role -> content of its ``result.json``.
    """
    file = path / "student" / "auxiliary" / "result.json"
    return [row_of("auxiliary teacher", read_record(file), teaches=True)] if file.is_file() else []
