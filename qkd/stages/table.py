"""The stages by name, in the order in which an experiment runs them."""

from __future__ import annotations

from collections.abc import Callable

from qkd.progress import Progress
from qkd.run.folder import RunFolder
from qkd.stages.bench import run as run_bench
from qkd.stages.export import run as run_export
from qkd.stages.report import run as run_report
from qkd.stages.search import run as run_search
from qkd.stages.student import run as run_distill
from qkd.stages.teacher import run as run_teacher

STAGES: dict[str, Callable[[RunFolder, Progress], None]] = {
    "teacher": run_teacher,
    "search": run_search,
    "distill": run_distill,
    "export": run_export,
    "bench": run_bench,
    "report": run_report,
}
