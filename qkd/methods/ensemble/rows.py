"""The rows of an ensemble teacher in a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import model_validator

from qkd.methods.report_row import Row
from qkd.report.records import Accuracies, Record


class EnsembleRecord(Record):
    """The ensemble's part of its teacher's result."""

    members: list[Accuracies] = []
    ensemble: Accuracies | None = None

    @model_validator(mode="after")
    def _has_members(self) -> EnsembleRecord:
        if self.ensemble is not None and not self.members:
            raise ValueError("an ensemble needs its members")
        return self


def ensemble_rows(path: Path, results: Mapping[str, Mapping[str, Any]]) -> list[Row]:  # noqa: ARG001
    """Return the row of the members' average.

    Args:
        path: The run folder.
        results: Role -> content of its ``result.json``.
    """
    teacher = results["teacher"]
    if not teacher.get("ensemble"):
        return []
    accuracy = teacher["ensemble"].get("test_accuracy")
    return [Row(f"ensemble of {len(teacher['members'])} teachers", str(teacher.get("net", "")), accuracy, teaches=True)]
