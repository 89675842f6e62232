"""Render a run as one self-contained HTML page, with the template ``page.html.j2`` next to this module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from qkd.foreign.shown import shown
from qkd.report.charts import Series, line_chart, schedule_chart
from qkd.report.findings.confusion import class_table, confusion_matrix, pair_table
from qkd.report.findings.gallery import Gallery
from qkd.report.findings.measurements import conditions
from qkd.report.findings.terms import TERMS
from qkd.report.searches import SearchRecord
from qkd.report.summary import RunSummary, model_table, size_table
from qkd.report.text import (
    cost_table,
    fall_back_table,
    flavor_sentence,
    layer_table,
    parity_sentence,
)
from qkd.report.tradeoff import COLORS, NEXT_COLOR, device_charts, device_table

MADE = "generator"  # a role whose labels are those requested from it, so it has no accuracy


@dataclass(frozen=True)
class RunRecord:
    """What a page shows in addition to the summary.

    Args:
        metrics: Role -> the lines of its ``metrics.jsonl``.
        schedules: Role -> operation -> strength in 0..1 for each epoch.
        stacks: Role -> SVG element of its schedule: probabilities and magnitudes, stacked over the epochs.
        agents: Role -> what its agent does, in one line.
        pictures: What a picture shows -> PNG file in base64.
        histogram: SVG element of the classes that the teacher sees in generated images; None if there are none.
        searches: Role -> results of its search, round by round.
        config: The resolved config as text.
        environment: Versions, seed and commit.
        gallery: Pictures of mistakes and of augmented images.
    """

    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    schedules: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    agents: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, Markup] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    histogram: Markup | None = None
    searches: Mapping[str, SearchRecord] = field(default_factory=dict)
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    gallery: Gallery = field(default_factory=Gallery)


def render_page(summary: RunSummary, record: RunRecord) -> str:
    """Return the page: table of models, sizes, cost, curves, schedules, layers, config and environment.

    Args:
        summary: The figures.
        record: Metrics, schedules, config and environment.

    Returns:
        One HTML page that needs no other file.
    """
    devices = device_table(summary)
    return fill_template(
        "page.html.j2",
        summary=summary,
        record=record,
        models=model_table(summary),
        verdicts=_verdicts(summary),
        sizes=size_table(summary),
        costs=cost_table(summary),
        terms=TERMS,
        classes=class_table(summary.predictions, summary.teacher_role),
        matrix=confusion_matrix(summary.predictions),
        pairs=pair_table(summary.predictions),
        devices=[row[:-1] for row in devices],
        device_notes=[
            f"{row[0]}{'' if row[1] == '-' else f', {row[1]}'}: {row[-1]}" for row in devices[1:] if row[-1] != "-"
        ],
        device_charts=[picture for pictures in device_charts(summary).values() for picture in pictures],
        curves=_curves(record.metrics) + ([] if record.histogram is None else [record.histogram]),
        searches=[_search(role, found) for role, found in record.searches.items()],
        schedules=[
            schedule_chart(f"{role}'s agent", rows, color=COLORS.get(role, NEXT_COLOR))
            for role, rows in record.schedules.items()
        ],
        layers=layer_table(summary),
        fall_backs=fall_back_table(summary),
        environment=[["what", "value"], *_flat(record.environment)],
    )


def fill_template(name: str, **values: Any) -> str:
    """Fill in a template of this package: everything is escaped, and control characters are written out.

    Args:
        name: Name of the template's file.
        values: Values by the names that it uses; a missing one is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here, as commands without a page import this

    templates = Environment(loader=PackageLoader("qkd.report", "."), autoescape=True, undefined=StrictUndefined,
                            trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    return shown(templates.get_template(name).render(**values))


def _verdicts(summary: RunSummary) -> list[tuple[str, bool]]:
    """Return what was compared and measured, and whether the result is good."""
    verdicts = []
    if summary.parity:
        verdicts.append((f"Parity {parity_sentence(summary)}", summary.parity["passed"]))
    for name, facts in summary.flavors.items():
        verdicts.append((flavor_sentence(name, facts), not facts["parity"] or facts["parity"]["passed"]))
    verdicts += [(f"Latency: {sentence}", True) for sentence in conditions(summary.devices)]
    return verdicts


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Markup]:
    charts = []
    for role, lines in metrics.items():
        color = COLORS.get(role, NEXT_COLOR)
        charts.append(line_chart(f"{role}: loss", _loss_series(lines, color), x_label="epoch"))
        if role == MADE:
            charts.append(line_chart(f"{role}: what the teacher sees", _fact_series(lines), x_label="epoch"))
            continue
        accuracy = [
            Series("training", _points(lines, "train_accuracy"), color, is_dashed=True),
            Series("validation", _points(lines, "val_accuracy"), color),
        ]
        charts.append(line_chart(f"{role}: accuracy", accuracy, x_label="epoch", percent=True))
    return charts


def _loss_series(lines: Sequence[Mapping[str, Any]], color: int) -> list[Series]:
    """Return the sum in the role's own color, and each term as a dashed curve in another color."""
    terms = list(dict.fromkeys(name for line in lines for name in line.get("terms", {})))
    series = [Series("sum", _points(lines, "train_loss"), color)]
    if len(terms) > 1:
        flat = [{"epoch": line["epoch"], **line.get("terms", {})} for line in lines]
        series += [
            Series(name, _points(flat, name), color + index, is_dashed=True) for index, name in enumerate(terms, 1)
        ]
    return series


def _fact_series(lines: Sequence[Mapping[str, Any]]) -> list[Series]:
    names = list(dict.fromkeys(name for line in lines for name in line.get("facts", {})))
    flat = [{"epoch": line["epoch"], **line.get("facts", {})} for line in lines]
    return [Series(name, _points(flat, name), index) for index, name in enumerate(names)]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["epoch"]), float(line[key])) for line in lines if isinstance(line.get(key), int | float)]


def _search(role: str, found: SearchRecord) -> Markup:
    curves = {"best": found.best, "mean": found.mean, "found schedule": found.chosen}
    series = [
        Series(name, list(zip(map(float, found.epochs), values, strict=True)), COLORS.get(role, NEXT_COLOR) + index,
               is_dashed=name == "mean")
        for index, (name, values) in enumerate(curves.items())
    ]  # fmt: skip
    title = f"{role}'s search: validation accuracy"
    return line_chart(title, series, x_label="epoch of the search", percent=True)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    rows = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            rows += _flat(inner, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", "-" if inner is None else str(inner)])
    return rows
