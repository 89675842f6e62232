"""The stages of an experiment, in order: each reads files of the run folder and writes its own."""

from __future__ import annotations

from collections.abc import Callable

from qkd.progress import Progress
from qkd.rundir import RunFolder
from qkd.stages import bench, report, search, student, teacher
from qkd.stages import export as export_stage

STAGES: dict[str, Callable[[RunFolder, Progress], None]] = {
    "teacher": teacher.run,
    "search": search.run,
    "distill": student.run,
    "export": export_stage.run,
    "bench": bench.run,
    "report": report.run,
}

__all__ = ["STAGES"]
