"""Render a run's summary as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.targets.table import ONNXRUNTIME
from qkd.report.findings.confusion import class_table, pair_table
from qkd.report.findings.measurements import conditions
from qkd.report.findings.terms import TERMS
from qkd.report.searches import SearchRecord, search_table
from qkd.report.summary import LayerRow, RunSummary, model_table, size_table
from qkd.report.table import markdown, plain_text
from qkd.report.tradeoff import device_table
from qkd.units import bytes_text

SIZE_NOTE = TERMS["size"]
SEARCH_NOTE = "Validation accuracies of members of the population; a search does not use the test images."
# row -> field of the totals, and whether it is bytes
COSTS = {
    "parameters": ("parameters", False),
    "multiply-accumulates": ("macs", False),
    "bit operations (BOPs)": ("bops", False),
    "weights at their bit width": ("weight_bytes", True),
    "weights, biases, weight scales": ("parameter_bytes", True),
    "activation peak, codes in bytes": ("peak_stored_bytes", True),
    "activation peak, at bit width": ("peak_packed_bytes", True),
}
COST_HEAD = ["", "student", "FP32 twin", "ratio"]
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
    """Return the heading and lines of the table of layers, as text."""
    return [LAYER_HEAD, *(_layer_cells(row) for row in summary.layers)]


def fall_back_table(summary: RunSummary) -> list[list[str]]:
    """Return the heading and lines of what stays in float in the student's file, as text."""
    return [["layer, and why it stays in float"], *([sentence] for sentence in summary.fall_backs)]


def render_text(
    summary: RunSummary, *, searches: Mapping[str, SearchRecord] | None = None, agents: Mapping[str, str] | None = None
) -> str:
    """Return ``report.md``: the models, what was compared, the agents and their searches, the layers.

    Args:
        summary: The figures.
        searches: Role -> results of its search.
        agents: Role -> what its agent does, in one line.

    Returns:
        Markdown, ending with a newline.
    """
    parts = [f"# {plain_text(summary.name)}"]
    if summary.verdict:
        parts.append(f"**{plain_text(summary.verdict)}**")
    parts.append(markdown(model_table(summary)))
    if summary.caveats:
        parts += ["## Notes on these figures", "\n".join(f"- {plain_text(caveat)}" for caveat in summary.caveats)]
    if summary.parity:
        parts += ["## Parity", plain_text(parity_sentence(summary))]
    parts += [plain_text(flavor_sentence(name, facts)) for name, facts in summary.flavors.items()]
    if len(classes := class_table(summary.predictions, summary.teacher_role)) > 1:
        parts += ["## Classes", markdown(classes), TERMS["classes"]]
    if len(pairs := pair_table(summary.predictions)) > 1:
        parts += ["## Most often confused", markdown(pairs)]
    if len(sizes := size_table(summary)) > 1:
        parts += ["## Size", markdown(sizes), SIZE_NOTE]
    if len(costs := cost_table(summary)) > 1:
        parts += ["## Cost of one image", markdown(costs)]
    if summary.devices:
        parts += [
            "## Latency",
            *map(plain_text, conditions(summary.devices)),
            markdown(device_table(summary)),
            TERMS["devices"],
        ]
    if searches:
        parts += ["## Search", markdown(search_table(searches)), SEARCH_NOTE]
        parts += [plain_text(one.cost) for one in searches.values() if one.cost]
    if agents:
        parts += [
            "## Agents",
            "\n".join(f"- {plain_text(role)}: {plain_text(words)}" for role, words in agents.items()),
        ]
    if summary.layers:
        parts += ["## Layers of the student", markdown(layer_table(summary))]
    if summary.fall_backs:
        parts += ["## Left in float", markdown(fall_back_table(summary))]
    return "\n\n".join(parts) + "\n"


def cost_table(summary: RunSummary) -> list[list[str]]:
    """Return the heading and lines of the student's cost next to its float twin's; only the heading if unknown."""
    return cost_rows(summary.cost) if summary.cost else [COST_HEAD]


def cost_rows(cost: Mapping[str, Any]) -> list[list[str]]:
    """Return the heading and lines of a cost report's totals, as text.

    Args:
        cost: The result of ``CostReport.to_json``.
    """
    rows = [COST_HEAD]
    for label, (key, is_bytes) in COSTS.items():
        values = [cost["student"][key], cost["float_twin"][key]]
        figures = [bytes_text(value) if is_bytes else f"{value:,}" for value in values]
        rows.append([label, *figures, f"{values[1] / values[0]:.2f}" if values[0] else "-"])
    return rows


def flavor_sentence(name: str, facts: Mapping[str, Any]) -> str:
    """Return the outcome for a student's file for another runtime."""
    parity = facts["parity"]
    if not parity:
        return f"{name}.onnx ({bytes_text(facts['size_bytes'])}): not compared."
    verdict = "passed" if parity["passed"] else "FAILED"
    return (
        f"{name}.onnx ({bytes_text(facts['size_bytes'])}): {verdict}: {parity['images']} test images, PyTorch against "
        f"{_runtime(parity)}; the class differs on {parity['off']['differing']}.{_foreign_sentence(facts, parity)}"
    )


def _foreign_sentence(facts: Mapping[str, Any], parity: Mapping[str, Any]) -> str:
    """Return whether the runtime that a file is for has run it, too."""
    found = parity.get("runtime")
    if found:
        verdict = "FAILED there" if found["faults"] else "passed there, too"
        return f" {found['runtime']}: {verdict} ({found['images']} images)."
    target = str(facts.get("target") or "")
    is_own = target in ("", ONNXRUNTIME) or target.startswith(f"{ONNXRUNTIME}>")
    return "" if is_own else f" Not run in {target}."


def _runtime(parity: Mapping[str, Any]) -> str:
    version = str(parity["runtime_version"])
    return version if version.startswith("qonnx") else f"ONNX Runtime {version}"


def parity_sentence(summary: RunSummary) -> str:
    """Return what was compared, and the outcome."""
    parity = summary.parity
    return (
        f"{'passed' if parity['passed'] else 'FAILED'}: {parity['images']} test images, PyTorch against ONNX Runtime "
        f"{parity['runtime_version']}; the class differs on {parity['off']['differing']} with optimizations off "
        f"and on {parity['on']['differing']} with them on.{_logits_sentence(parity)}{_codes_sentence(parity)}"
        f"{_provider_sentence(parity)}"
    )


def _provider_sentence(parity: Mapping[str, Any]) -> str:
    found = parity.get("provider")
    if not found:
        return ""
    values = sum(layer.get("values", 0) for layer in found.get("layers", ()) if layer.get("is_claimed"))
    verdict = "NOT those" if found.get("faults") else "those"
    taken = "?" if found.get("claimed_layers") is None else found["claimed_layers"]
    return (
        f" {found['provider']} computes {taken} of {found['layer_count']} layers: the outputs of "
        f"{found['images']} images, and {values:,} codes at the ends of its layers, are {verdict} of the CPU provider."
    )


def _logits_sentence(parity: Mapping[str, Any]) -> str:
    steps = [parity[side].get("max_steps") for side in ("off", "on")]
    if None in steps:
        return ""
    return f" Logits differ by at most {steps[0]:.2g} output steps with them off and {steps[1]:.2g} with them on."


def _codes_sentence(parity: Mapping[str, Any]) -> str:
    layers = parity.get("layers", ())
    if not layers:
        return ""
    values, off, on = (sum(layer.get(key, 0) for layer in layers) for key in ("values", "differing", "differing_on"))
    return (
        f" Layer by layer, on {parity['layer_images']} images: {off:,} of {values:,} codes differ between student and "
        f"file, {on:,} between the file's arithmetic and each integer kernel fed the same codes."
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
