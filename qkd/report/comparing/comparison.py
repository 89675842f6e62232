"""Runs side by side: accuracy, size, latency and bits of each student, as a table, plain data or a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qkd.config.binding import read_config
from qkd.files import DamagedFileError, write_text
from qkd.report.caveats import interval_text
from qkd.report.comparing.differences import Difference, difference_cells, difference_notes, differences
from qkd.report.summary import RunSummary, summarize
from qkd.report.table import align
from qkd.units import counted, megabytes, milliseconds, percent

HEAD = ["run", "student", "net", "accuracy", "teacher", "size", "FP32 / size", "latency", "FP32 / latency", "needs",
        "state"]  # fmt: skip
MEASURED = "measured on"
TERMS = (
    "Accuracy: on the test images, with its 95 % interval; it is not comparable across data sets. FP32 / "
    "size, FP32 / latency: how many times smaller and faster the student's file is than that of the same net with "
    "32-bit floats. Latencies of different machines, batches or threads cannot be compared; the ratios can, with care."
)


@dataclass(frozen=True)
class RunRow:
    """A run among others.

    Args:
        run: Its name.
        student: Its bits, such as ``w2a2``; empty before there is a student.
        net: The student's net.
        accuracy, teacher_accuracy: Fractions of the test images; the latter of what the student learned from.
        interval: 95 % interval of the student's accuracy.
        size_bytes, size_ratio: Size of the student's file, and the FP32 file's size divided by it.
        median_ms, latency_ratio: Latency of one inference, and FP32's divided by it.
        needs: What runs the file.
        device, batch_size, threads: Where the latency was measured, with how many images and intra-op threads; empty or
            None if unknown.
        state: ``complete``, or how far it got; what has changed since its report; or why it cannot be read.
    """

    run: str
    student: str = ""
    net: str = ""
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    teacher_accuracy: float | None = None
    size_bytes: int | None = None
    size_ratio: float | None = None
    median_ms: float | None = None
    latency_ratio: float | None = None
    needs: str = ""
    state: str = ""
    device: str = ""
    batch_size: int | None = None
    threads: int | None = None

    @property
    def measured(self) -> str:
        """How the latency was measured; empty if there is none."""
        if self.median_ms is None:
            return ""
        parts = [self.device, "" if self.batch_size is None else f"batch {self.batch_size}"]
        return ", ".join([*filter(None, parts), *([] if self.threads is None else [counted(self.threads, "thread")])])


@dataclass(frozen=True)
class RunsTable:
    """Runs side by side.

    Args:
        rows: One run each.
        folder: The folder that was searched; empty if the runs were named.
        differences: Differences of the later runs from the first one, figure by figure.
        notes: Notes on the differences.
    """

    rows: tuple[RunRow, ...]
    folder: str = ""
    differences: tuple[Difference, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows as plain data, each with its differences from the first; accuracies are fractions."""
        rows = [asdict(row) for row in self.rows]
        for one in self.differences:
            rows[one.position].setdefault("differences", []).append(asdict(one))
        return rows

    def cells(self) -> list[list[str]]:
        """Return the heading and one line per run, as text; also how latencies were measured, if not all alike."""
        lines = [HEAD, *(_cells(row) for row in self.rows)]
        if not _is_mixed(self.rows):
            return lines
        told = [MEASURED, *(row.measured or "-" for row in self.rows)]
        place = HEAD.index("latency") + 1
        return [[*line[:place], words, *line[place:]] for line, words in zip(lines, told, strict=True)]

    def to_text(self) -> str:
        """Return the tables as text."""
        if not self.rows:
            return f"{self.folder}: no runs"
        tables = [align(self.cells())]
        if self.differences:
            tables.append(f"compared with {self.differences[0].against}:\n{align(difference_cells(self.differences))}")
        return "\n\n".join([*tables, *(["\n".join(f"note: {note}" for note in self.notes)] if self.notes else [])])


def compare_runs(folders: Sequence[Path]) -> RunsTable:
    """Return run folders side by side, in that order.

    Args:
        folders: Run folders, however far they got; a damaged one gets a line that says so.

    Raises:
        OSError: If a record cannot be read.
    """
    summaries: list[RunSummary | None] = []
    rows: list[RunRow] = []
    names = [folder.name for folder in folders]
    for folder in folders:
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        try:
            summary = replace(summarize(folder), name=name)
        except (DamagedFileError, ImportError) as error:
            summaries.append(None)
            rows.append(RunRow(name, state=f"cannot be read: {error}"))
        else:
            summaries.append(summary)
            rows.append(_row(name, summary))
        rows[-1] = replace(rows[-1], state=_config_fault(folder) or rows[-1].state)
    apart = differences(summaries)
    return RunsTable(tuple(rows), differences=apart, notes=tuple(difference_notes(apart, folders)))


def runs_below(folder: Path) -> RunsTable:
    """Return all runs of a folder side by side, by name.

    Raises:
        OSError: If it cannot be read.
    """
    found = sorted(path.parent for path in folder.glob("*/config.yaml"))
    return RunsTable(compare_runs(found).rows, str(folder))


def render_comparison(table: RunsTable) -> str:
    """Return a page of runs side by side that needs no other file."""
    from qkd.report.page import fill_template  # here, since a table alone needs no page

    return fill_template("comparison.html.j2", rows=table.cells(), terms=TERMS, charts=_charts(table),
                         differences=difference_cells(table.differences), notes=table.notes,
                         against=table.differences[0].against if table.differences else "")  # fmt: skip


def write_comparison(table: RunsTable, out: Path) -> None:
    """Write the page of runs side by side.

    Raises:
        OSError: If it cannot be written.
    """
    write_text(out, render_comparison(table))


def _row(name: str, summary: RunSummary) -> RunRow:
    student, twin, teacher = summary.student, summary.twin, summary.followed
    row = RunRow(name, teacher_accuracy=teacher.test_accuracy if teacher else None, state=_state(summary))
    if student is None:
        return row
    values: Mapping[str, Any] = {
        "student": student.role.removeprefix("student").strip(),
        "net": student.net,
        "accuracy": student.test_accuracy,
        "interval": student.interval,
        "size_bytes": student.size_bytes,
        "size_ratio": _ratio(twin.size_bytes if twin else None, student.size_bytes),
        "median_ms": student.median_ms,
        "latency_ratio": _ratio(twin.median_ms if twin else None, student.median_ms),
        "needs": student.needs,
        "device": str(summary.bench.get("device", "")),
        "batch_size": summary.bench.get("batch_size"),
        "threads": summary.bench.get("threads"),
    }
    return RunRow(**{**asdict(row), **values})


def _state(summary: RunSummary) -> str:
    if summary.parity and not summary.parity.get("passed"):
        return "parity FAILED"
    if summary.outdated:
        return f"report outdated ({summary.outdated})"
    steps = {
        "complete": summary.report,
        "measured": summary.bench,
        "exported": summary.parity,
        "student trained": summary.student,
        "teacher trained": summary.models,
    }
    return next((words for words, is_there in steps.items() if is_there), "begun")


def _config_fault(folder: Path) -> str:
    """Return what is wrong with a run's config; empty if it can be read, or there is none."""
    file = folder / "config.yaml"
    if not file.exists():
        return ""
    try:
        read_config(file)
    except (OSError, ValueError) as error:
        fault = next(iter(str(error).splitlines()), "unreadable").removeprefix(f"{file}: ")
        return f"config.yaml is damaged ({fault}); restore it, or delete the run folder"
    return ""


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def _cells(row: RunRow) -> list[str]:
    interval = "" if row.interval is None else f" ({interval_text(row.interval)})"
    return [
        row.run,
        row.student or "-",
        row.net or "-",
        percent(row.accuracy) + interval,
        percent(row.teacher_accuracy),
        megabytes(row.size_bytes),
        _times(row.size_ratio),
        milliseconds(row.median_ms),
        _times(row.latency_ratio),
        row.needs.removeprefix("onnxruntime ") or "-",
        row.state,
    ]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _charts(table: RunsTable) -> list[Any]:
    from qkd.report.charts import Point, scatter_chart

    known = [row for row in table.rows if row.accuracy is not None]
    pairs = (
        ("accuracy against size", "size of the file in kB", "size_bytes", 1e-3),
        ("accuracy against latency", "median latency in ms", "median_ms", 1.0),
    )
    charts = []
    for title, label, key, factor in pairs:
        is_mixed = key == "median_ms" and _is_mixed(known)
        points = [
            Point(
                f"{row.run} {row.student}{f' ({row.measured})' if is_mixed else ''}",
                factor * getattr(row, key),
                row.accuracy or 0.0,
                index,
            )
            for index, row in enumerate(known)
            if getattr(row, key) is not None
        ]
        if points:
            title = f"{title} (not measured alike)" if is_mixed else title
            charts.append(scatter_chart(title, points, x_label=label, percent=True))
    return charts


def _is_mixed(rows: Sequence[RunRow]) -> bool:
    """Return whether latencies of runs are of different devices, batches or threads."""
    return len({row.measured for row in rows if row.median_ms is not None}) > 1
