"""Compare accuracy with latency and size, one device at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from qkd.report.charts import Point, scatter_chart
from qkd.report.summary import ROLES, RunSummary
from qkd.report.table import DEVICE_HEAD, device_cells, device_label, device_notes

HEAD = [*DEVICE_HEAD, "notes"]
# the same in every picture; other models share the next color
COLORS = {"teacher": 0, "student": 1, "float": 2, "float twin": 2}
NEXT_COLOR = 3


def device_table(summary: RunSummary) -> list[list[str]]:
    """Return the heading and lines of the table of devices, as text; a failed device gets a line with the reason."""
    rows = [HEAD]
    for bench in summary.devices:
        for name, row in bench.get("models", {}).items():
            rows.append(_cells(bench, name, row))
        if bench.get("failure"):
            rows.append([str(bench["device"]), *["-"] * (len(HEAD) - 2), f"FAILED: {bench['failure']}"])
    return rows


def device_charts(summary: RunSummary) -> dict[str, list[Markup]]:
    """Return device -> its two pictures: accuracy against latency, and accuracy against file size.

    Accuracies are those measured on the device's sample if every model has one, otherwise those on the test set.
    """
    charts = {}
    for bench in summary.devices:
        scores, words = _scores(summary, bench)
        rows = {name: row for name, row in bench.get("models", {}).items() if scores.get(name) is not None}
        if not rows:
            continue
        known = [(row, _label(name), scores[name], COLORS.get(row.get("model") or name, NEXT_COLOR))
                 for name, row in rows.items()]  # fmt: skip
        latency = [Point(label, row["median_ms"], score, color) for row, label, score, color in known]
        size = [Point(label, row["size_bytes"] / 1e3, score, color) for row, label, score, color in known
                if row.get("size_bytes") is not None]  # fmt: skip
        head = f"{bench['device']}: {words}"
        charts[str(bench["device"])] = [
            scatter_chart(f"{head} against latency", latency, x_label="median latency in ms", percent=True),
            scatter_chart(f"{head} against size", size, x_label="size of the file in kB", percent=True),
        ]
    return charts


def _scores(summary: RunSummary, bench: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    rows = bench.get("models", {})
    measured = {name: row.get("accuracy") for name, row in rows.items()}
    if rows and all(value is not None for value in measured.values()):
        return measured, f"accuracy on {bench.get('images', 'some')} images there"
    lines = {"teacher": summary.teacher, "float": summary.twin, "student": summary.student}
    known = {name: row.test_accuracy for name, row in lines.items() if row and row.test_accuracy is not None}
    # a model's outputs under a provider are compared before it is measured, so its accuracy is the model's own
    models = {name: row.get("model") or name for name, row in rows.items()}
    return {name: known[model] for name, model in models.items() if model in known}, "test accuracy"


def _cells(bench: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> list[str]:
    reference = bench.get("models", {}).get(bench.get("reference"), {}).get("median_ms")
    ratio = row["median_ms"] / reference if reference else None
    label = device_label(_label(name), is_reference=name == bench.get("reference"))
    return [str(bench["device"]), label, *device_cells(row, ratio), "; ".join(device_notes(row)) or "-"]


def _label(name: str) -> str:
    model, comma, provider = name.partition(", ")
    return ROLES.get(name) or ROLES.get(model, model) + comma + provider
