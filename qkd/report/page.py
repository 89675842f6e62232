"""Render a run as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from qkd.foreign.shown import shown
from qkd.report.charts import Series, line_chart, schedule_chart
from qkd.report.searches import SearchRecord
from qkd.report.summary import RunSummary, model_table, size_table
from qkd.report.text import (
    SIZE_NOTE,
    cost_table,
    fall_back_table,
    flavour_sentence,
    latency_sentence,
    layer_table,
    parity_sentence,
)
from qkd.report.tradeoff import device_charts, device_table

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #ffffff; --soft: #667085; --rule: #d7dce3;
  --c1: #2563b8; --c2: #c2410c; --c3: #15803d; --c4: #7e3fb5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181f; --soft: #9aa5b4; --rule: #333b47;
  --c1: #74a9f2; --c2: #f29a63; --c3: #6bcf8d; --c4: #c39bf0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th { color: var(--soft); font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--rule); } .curve { fill: none; stroke-width: 1.8; } .cell { fill: var(--c1); }
.end { text-anchor: end; } .mid { text-anchor: middle; } .title { font-weight: 600; font-size: 12px; }
.empty, .note { color: var(--soft); } .failed { color: var(--c2); font-weight: 600; }
pre { overflow-x: auto; font-size: 13px; }
"""


@dataclass(frozen=True)
class RunRecord:
    """What a page shows beside the summary.

    Args:
        metrics: Role -> the lines of its ``metrics.jsonl``.
        schedules: Role -> operation -> strength in 0..1 for each epoch.
        stacks: Role -> SVG element of its schedule: probabilities and magnitudes, stacked over the epochs.
        agents: Role -> what its agent does, in a line.
        searches: Role -> what its search came to, round by round.
        config: The resolved config as text.
        environment: Versions, seed and commit.
    """

    metrics: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    schedules: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    agents: Mapping[str, str] = field(default_factory=dict)
    stacks: Mapping[str, str] = field(default_factory=dict)
    searches: Mapping[str, SearchRecord] = field(default_factory=dict)
    config: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)


def render_page(summary: RunSummary, record: RunRecord) -> str:
    """Return the page: table of models, sizes, cost, curves, schedules, layers, config and environment.

    Args:
        summary: The figures.
        record: Metrics, schedules, config and environment.

    Returns:
        One HTML page that needs no other file.
    """
    sections = [
        _table(model_table(summary)),
        _section("Read this with the figures", _caveats(summary)),
        _verdicts(summary),
        _section("Size", _sizes(summary)),
        _section("Cost of one image", _table(cost_table(summary)) if summary.cost else ""),
        _section("Devices", _devices(summary)),
        _section("Training", _curves(record.metrics)),
        _section("Search", _searches(record.searches)),
        _section("Agents", _agents(record)),
        _section("Layers of the student", _table(layer_table(summary)) if summary.layers else ""),
        _section("Left in float", _table(fall_back_table(summary)) if summary.fall_backs else ""),
        _section("Config", f"<pre>{escape(record.config)}</pre>" if record.config else ""),
        _section("Environment", _table([["what", "value"], *_flat(record.environment)]) if record.environment else ""),
    ]
    name = escape(summary.name)
    return shown(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n{''.join(sections)}</body></html>\n"
    )


def _sizes(summary: RunSummary) -> str:
    rows = size_table(summary)
    return f'{_table(rows)}<p class="note">{escape(SIZE_NOTE)}</p>' if len(rows) > 1 else ""


def _caveats(summary: RunSummary) -> str:
    lines = "".join(f"<li>{escape(caveat)}</li>" for caveat in summary.caveats)
    return f"<ul>{lines}</ul>" if lines else ""


def _verdicts(summary: RunSummary) -> str:
    parts = []
    if summary.parity:
        style = "note" if summary.parity["passed"] else "failed"
        parts.append(f'<p class="{style}">Parity {escape(parity_sentence(summary))}</p>')
    for name, facts in summary.flavours.items():
        style = "failed" if facts["parity"] and not facts["parity"]["passed"] else "note"
        parts.append(f'<p class="{style}">{escape(flavour_sentence(name, facts))}</p>')
    if summary.bench:
        parts.append(f'<p class="note">Latency: {escape(latency_sentence(summary))}</p>')
    return "".join(parts)


def _devices(summary: RunSummary) -> str:
    rows = device_table(summary)
    if len(rows) == 1:
        return ""
    charts = "".join(picture for pictures in device_charts(summary).values() for picture in pictures)
    return _table(rows) + (f'<div class="charts">{charts}</div>' if charts else "")


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    charts = []
    for role, lines in metrics.items():
        charts.append(line_chart(f"{role}: loss", _loss_series(lines), x_label="epoch"))
        accuracy = [
            Series("training", _points(lines, "train_accuracy"), 0, is_dashed=True),
            Series("validation", _points(lines, "val_accuracy"), 1),
        ]
        charts.append(line_chart(f"{role}: accuracy", accuracy, x_label="epoch", percent=True))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _loss_series(lines: Sequence[Mapping[str, Any]]) -> list[Series]:
    terms = list(dict.fromkeys(name for line in lines for name in line.get("terms", {})))
    series = [Series("sum", _points(lines, "train_loss"), 0)]
    if len(terms) > 1:
        flat = [{"epoch": line["epoch"], **line.get("terms", {})} for line in lines]
        series += [Series(name, _points(flat, name), index, is_dashed=True) for index, name in enumerate(terms, 1)]
    return series


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(line["epoch"]), float(line[key])) for line in lines if isinstance(line.get(key), int | float)]


def _searches(searches: Mapping[str, SearchRecord]) -> str:
    charts, lines = [], []
    for role, found in searches.items():
        series = [
            Series(name, list(zip(map(float, found.epochs), values, strict=True)), colour, is_dashed=name == "mean")
            for colour, (name, values) in enumerate(
                {"best": found.best, "mean": found.mean, "found schedule": found.chosen}.items()
            )
        ]
        title = f"{role}'s search: validation accuracy"
        charts.append(line_chart(title, series, x_label="epoch of the search", percent=True))
        lines.append(f'<p class="note">{escape(found.cost)}</p>')
    return f'<div class="charts">{"".join(charts)}</div>{"".join(lines)}' if charts else ""


def _agents(record: RunRecord) -> str:
    lines = "".join(f"<p><b>{escape(role)}</b>: {escape(words)}</p>" for role, words in record.agents.items())
    charts = [schedule_chart(f"{role}'s agent", rows) for role, rows in record.schedules.items()]
    if not charts:
        return lines
    note = "The darker, the more often and the stronger an operation acts (probability x magnitude)."
    pictures = "".join(record.stacks.values())
    return f'{lines}<div class="charts">{"".join(charts)}</div><p class="note">{note}</p>{pictures}'


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{content}\n" if content else ""


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows[1:])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    rows = []
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            rows += _flat(inner, f"{prefix}{key}.")
        else:
            rows.append([f"{prefix}{key}", "-" if inner is None else str(inner)])
    return rows
