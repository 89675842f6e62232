"""Render a run's summary as Markdown."""

from __future__ import annotations

from qkd.report.summary import LayerRow, RunSummary, model_table
from qkd.report.table import markdown
from qkd.report.tradeoff import device_table

LAYER_HEAD = [
    "layer",
    "kind",
    "weight bits",
    "input bits",
    "codes used",
    "codes allowed",
    "parameters",
    "MACs",
    "parity",
]


def layer_table(summary: RunSummary) -> list[list[str]]:
    """Return heading and lines of the table of layers, as text."""
    return [LAYER_HEAD, *(_layer_cells(row) for row in summary.layers)]


def render_text(summary: RunSummary) -> str:
    """Return ``report.md``: the models, what was compared, the layers."""
    parts = [f"# {summary.name}", markdown(model_table(summary))]
    if summary.parity:
        parts += ["## Parity", parity_sentence(summary)]
    if summary.bench:
        parts += ["## Latency", latency_sentence(summary)]
    if summary.devices:
        parts.append(markdown(device_table(summary)))
    if summary.layers:
        parts += ["## Layers of the student", markdown(layer_table(summary))]
    return "\n\n".join(parts) + "\n"


def parity_sentence(summary: RunSummary) -> str:
    """Return what was compared with what, and the outcome."""
    parity = summary.parity
    return (
        f"{'passed' if parity['passed'] else 'FAILED'}: {parity['images']} test images, PyTorch against ONNX Runtime "
        f"{parity['runtime_version']}; the class differs on {parity['off']['differing']} with optimisations off "
        f"and on {parity['on']['differing']} with them on."
    )


def latency_sentence(summary: RunSummary) -> str:
    """Return how the latencies were taken."""
    bench, machine = summary.bench, summary.bench["machine"]
    return (
        f"{machine['cpu']}, {bench['threads']} thread(s), batch {bench['batch_size']}, {bench['rounds']} rounds of all "
        f"files in turns after {bench['warmup']} of warm-up, ONNX Runtime {machine['onnxruntime']}."
    )


def _layer_cells(row: LayerRow) -> list[str]:
    return [
        row.name,
        row.kind,
        str(row.weight_bits),
        str(row.act_bits),
        f"{row.used[0]} .. {row.used[1]}",
        f"{row.allowed[0]} .. {row.allowed[1]}",
        f"{row.parameters:,}",
        f"{row.macs:,}",
        _steps(row.parity_steps),
    ]


def _steps(steps: float | None) -> str:
    if steps is None:
        return "-"
    return "equal" if steps == 0 else f"{steps:g} steps"
