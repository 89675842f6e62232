"""Show latencies of models on several devices, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from export.devices import DeviceResult
from qkd.bench.record import Record
from qkd.report.findings.terms import TERMS
from qkd.report.table import DEVICE_HEAD, align, device_cells, device_label, device_notes, settings_text


@dataclass(frozen=True)
class BenchTable:
    """Latencies, ratios and scores of models on devices.

    Args:
        results: One per device.
        records: The record of each.
        reference: Name of the float model that ratios are to; None if there is none.
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
        """Return the table, with notes and failures at the ends of rows, and the columns' meanings below."""
        rows, ends = [DEVICE_HEAD], ["notes"]
        for result, record in zip(self.results, self.records, strict=True):
            for name, row in record["models"].items():
                label = device_label(name, is_reference=name == self.reference)
                rows.append([result.device.title, label, *device_cells(row, row["to_float"])])
                ends.append("; ".join(device_notes(row)))
            if result.failure:
                rows.append([result.device.title, "-", *["-"] * (len(DEVICE_HEAD) - 2)])
                ends.append(f"FAILED: {result.failure}")
        lines = align(rows).splitlines()
        width = max(map(len, lines))
        table = [f"{line:<{width}}  {end}".rstrip() for line, end in zip(lines, ends, strict=True)]
        if len(self.failures) == len(self.results):
            return "\n".join(table)
        return "\n".join([*table, *self._settings(), TERMS["devices"]])

    def _settings(self) -> list[str]:
        """Return how it was measured: one line if all devices were alike, else one per device."""
        told = {
            result.device.title: settings_text({**record, **row})
            for result, record in zip(self.results, self.records, strict=True)
            for row in record["models"].values()
        }
        same = set(told.values())
        return [f"{one}." for one in same] if len(same) == 1 else [f"{name}: {one}." for name, one in told.items()]
