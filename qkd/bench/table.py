"""Show what models took on several devices, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.devices import DeviceResult, LatencyReport
from qkd.bench.record import Record
from qkd.report.table import align, megabytes, milliseconds, percent

HEAD = ["device", "model", "median", "p10", "p90", "p99", "to float", "size", "memory", "accuracy", "agreement"]


@dataclass(frozen=True)
class BenchTable:
    """Latencies, ratios and scores of models on devices.

    Args:
        results: One a device.
        records: Of each, what is written of it.
        reference: Name of the float model that ratios are to; None where there is none.
    """

    results: Sequence[DeviceResult]
    records: Sequence[Record]
    reference: str | None = None

    @property
    def failures(self) -> dict[str, str]:
        """Name of a device -> why it failed."""
        return {result.device.title: result.failure for result in self.results if result.failure}

    @property
    def is_input_fault(self) -> bool:
        """Whether every device failed because of its input."""
        return all(result.failure and result.is_input_fault for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Return the records as plain data."""
        return {"reference": self.reference, "devices": list(self.records)}

    def to_text(self) -> str:
        """Return the table; notes and failures stand at the end of their rows."""
        rows, ends = [HEAD], ["notes"]
        for result, record in zip(self.results, self.records, strict=True):
            for name, report in result.reports.items():
                rows.append([result.device.title, name, *_cells(report, record["models"][name]["to_float"])])
                ends.append("; ".join(_notes(report)))
            if result.failure:
                rows.append([result.device.title, "-", *["-"] * (len(HEAD) - 2)])
                ends.append(f"FAILED: {result.failure}")
        lines = align(rows).splitlines()
        width = max(map(len, lines))
        return "\n".join(f"{line:<{width}}  {end}".rstrip() for line, end in zip(lines, ends, strict=True))


def _cells(report: LatencyReport, ratio: float | None) -> list[str]:
    return [
        *(milliseconds(value) for value in (report.median_ms, report.p10_ms, report.p90_ms, report.p99_ms)),
        "-" if ratio is None else f"{ratio:.3f}",
        megabytes(report.size_bytes),
        megabytes(report.peak_memory_bytes),
        percent(report.accuracy),
        percent(report.agreement),
    ]


def _notes(report: LatencyReport) -> list[str]:
    repacked = [f"weights repacked to {', '.join(report.repacked)}"] if report.repacked else []
    return [*repacked, *report.notes]
