"""The results of a federated run: accuracy by round and by bytes, as a record, a table and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qkd.files import read_json, write_json, write_text
from qkd.report.charts import Series, line_chart
from qkd.report.drawing import svg_file
from qkd.report.table import align, markdown
from qkd.units import bytes_text, percent

HEAD = ("round", "clients", "loss", "validation, by clients", "test", "sent to clients", "sent by clients")
SHOWN = 12  # rows of the table on a terminal
ROUNDS, TABLE = "rounds.json", "rounds.md"
MEGA, KILO = 1_000_000, 1_000


def summed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rounds with the bytes of all rounds so far: ``total_bytes_down``, ``total_bytes_up``.

    Args:
        rows: As the server recorded them.
    """
    down = up = 0
    result = []
    for row in rows:
        down, up = down + row["bytes_down"], up + row["bytes_up"]
        result.append({**row, "total_bytes_down": down, "total_bytes_up": up})
    return result


def write_rounds(folder: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the record of a run's rounds: JSON, a Markdown table, accuracy by round and by bytes as SVG.

    Args:
        folder: Where to.
        rows: As the server recorded them.

    Returns:
        The files.

    Raises:
        OSError: If one cannot be written.
    """
    whole = summed(rows)
    write_json(folder / ROUNDS, {"rounds": whole})
    write_text(folder / TABLE, markdown([HEAD, *map(_cells, whole)]) + "\n")
    pictures = {"accuracy_by_round.svg": _by_round(whole), "accuracy_by_bytes.svg": _by_bytes(whole)}
    for name, picture in pictures.items():
        write_text(folder / name, svg_file(picture))
    return [folder / ROUNDS, folder / TABLE, *(folder / name for name in pictures)]


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["round"]) if row["round"] else "calibration",
        f"{len(row['weights'])} of {len(row['clients'])}",
        f"{row['loss']:.4f}" if "loss" in row else "-",
        percent(row.get("val_accuracy")),
        percent(row.get("test_accuracy")),
        bytes_text(row["total_bytes_down"]),
        bytes_text(row["total_bytes_up"]),
    ]


def _curves(rows: Sequence[Mapping[str, Any]], place: Any) -> list[Series]:
    kinds = {"test": "test_accuracy", "validation, by clients": "val_accuracy"}
    found = {name: [(place(row), row[key]) for row in rows if row.get(key) is not None] for name, key in kinds.items()}
    return [
        Series(name, points, color=index, is_dashed=index > 0)
        for index, (name, points) in enumerate(found.items()) if points
    ]  # fmt: skip


def _by_round(rows: Sequence[Mapping[str, Any]]) -> Markup:
    series = _curves(rows, lambda row: float(row["round"]))
    return line_chart("Accuracy by round", series, x_label="round", percent=True)


def _by_bytes(rows: Sequence[Mapping[str, Any]]) -> Markup:
    total = rows[-1]["total_bytes_down"] + rows[-1]["total_bytes_up"] if rows else 0
    unit, name = (MEGA, "MB") if total >= 5 * MEGA else (KILO, "kB")
    series = _curves(rows, lambda row: (row["total_bytes_down"] + row["total_bytes_up"]) / unit)
    return line_chart("Accuracy by bytes", series, x_label=f"{name}, both ways", percent=True)


@dataclass(frozen=True)
class FederatedReport:
    """The output of `qkd federate`.

    Args:
        name: Of the run.
        settings: Strategy, clients and so on, as in the config.
        rounds: With bytes so far.
        result: Of the final global student.
        parity: In one line; empty for a float net.
    """

    name: str
    settings: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    parity: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "name": self.name, "federated": dict(self.settings), "result": dict(self.result), "parity": self.parity,
            "rounds": [dict(row) for row in self.rounds],
        }  # fmt: skip

    def to_text(self) -> str:
        """Return a table of the scored rounds (some of them if there are many), and the result."""
        settings, scored = self.settings, [row for row in self.rounds if "test_accuracy" in row]
        stride = max(1, -(-len(scored) // SHOWN))
        shown = scored[::-1][::stride][::-1]  # the last one is always among them
        dropped = sum(len(row["dropped"]) for row in self.rounds)
        lines = [
            f"{self.name}: {settings['strategy']}, {settings['clients']} clients, Dirichlet alpha {settings['alpha']}, "
            f"{settings['precision']}, upload {settings['upload']}",
            align([HEAD, *map(_cells, shown)]),
            f"final student: test accuracy {percent(self.result['test_accuracy'])}",
        ]
        lines += [f"clients left out because they failed: {dropped}"] if dropped else []
        return "\n".join([*lines, *([self.parity] if self.parity else [])])


def read_report(folder: Path, name: str, settings: Mapping[str, Any]) -> FederatedReport:
    """Read the report of a complete federated run from its folder.

    Args:
        folder: The run folder.
        name: Of the run.
        settings: The section ``federated`` of its config.
    """
    parity = folder / "export" / "parity.json"
    line = ""
    if parity.is_file():
        found = read_json(parity)
        line = f"student.onnx equals the student: {found['images']} test images compared"
    rounds = read_json(folder / "federated" / ROUNDS)["rounds"]
    return FederatedReport(name, settings, rounds, read_json(folder / "student" / "result.json"), line)
