"""The table of a student's layers: bits, codes used, and whether the exported file computes the same codes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from export import LayerParity, ParityReport
from quantizers import IntegerView, Student, integer_view, layer_report
from quantizers.integer import Quantize


def layer_rows(student: Student, report: ParityReport) -> list[dict[str, Any]]:
    """Return one row per convolution or linear layer, as plain values.

    These are the rows of ``quantizers.layer_report``, with ``parity_steps`` added: the largest difference between
    student and file in the codes of the layer's output (in output steps of the logits for the last layer); None if
    these were not compared.

    Args:
        student: The calibrated student.
        report: Its comparison with the exported file.
    """
    steps = _steps(integer_view(student), report)
    return [{**row, "parity_steps": steps.get(row["name"])} for row in layer_report(student)]


def _steps(view: IntegerView, report: ParityReport) -> dict[str, float | None]:
    compared: dict[str, LayerParity] = {layer.name: layer for layer in report.layers}
    return {node.name: _worst(node.output, view, compared, report) for node in view.nodes}


def _worst(edge: str, view: IntegerView, compared: Mapping[str, LayerParity], report: ParityReport) -> float | None:
    """Return the largest difference on the first grids that an edge reaches."""
    found: list[float] = []
    pending, seen = [edge], {edge}
    while pending:
        current = pending.pop()
        if current in view.outputs and report.off.max_steps is not None and math.isfinite(report.off.max_steps):
            found.append(report.off.max_steps)
        for node in view.nodes:
            if current not in node.inputs or node.output in seen:
                continue
            if isinstance(node, Quantize):
                found += [compared[node.name].max_steps] if node.name in compared else []
            else:
                seen.add(node.output)
                pending.append(node.output)
    return max(found, default=None)
