"""An epoch's metrics for the user and for other programs: a line, a CSV table, TensorBoard."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.extras import TENSORBOARD
from qkd.config import LogConfig
from qkd.engines.membership import is_first
from qkd.files import write_text
from qkd.progress import duration


class EpochLog:
    """Writes the metrics of a training after each epoch.

    ``metrics.jsonl`` and ``metrics.csv`` are rewritten as a whole after every epoch; TensorBoard's files grow.

    Args:
        folder: The role's folder in the run folder.
        role: Name shown to the user and in TensorBoard.
        config: What to write.
    """

    def __init__(self, folder: Path, role: str, config: LogConfig) -> None:
        self.folder, self.role, self.config = folder, role, config
        self._shown: int | None = None

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write all epochs so far; the first call shows where a training begins or resumes.

        Raises:
            ImportError: If TensorBoard is requested but not installed.
            OSError: If a file cannot be written.
        """
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if self.config.csv:
            write_text(self.folder / "metrics.csv", csv_of(rows))
        if self.config.tensorboard and is_first():  # of several processes that train together
            self._to_tensorboard(rows[len(rows) if self._shown is None else self._shown :])
        self._shown = len(rows)

    def _to_tensorboard(self, rows: Sequence[Mapping[str, Any]]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"log.tensorboard: TensorBoard is missing: {TENSORBOARD}") from error
        writer = SummaryWriter(str(self.folder / "tensorboard"))
        for row in rows:
            for name, value in flat(row).items():
                if isinstance(value, int | float) and name != "epoch":
                    writer.add_scalar(f"{self.role}/{name}", value, row["epoch"])
        writer.close()


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of the metrics without groups, e.g. with the key ``terms.soft_target``.

    Example:
        >>> flat({"epoch": 1, "terms": {"cross_entropy": 0.5}})
        {'epoch': 1, 'terms.cross_entropy': 0.5}
    """
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, Mapping) else {key: value}
    return found


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return lines of the metrics as CSV; columns that an epoch lacks are empty."""
    lines = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def epoch_line(role: str, row: Mapping[str, Any], epochs: int) -> str:
    """Return an epoch as one line of text.

    Args:
        role: The trained role.
        row: A line of the metrics.
        epochs: Length of the whole training.
    """
    parts = [f"{role}, epoch {row['epoch']}/{epochs} ({row['phase']}): loss {row['train_loss']:.4g}"]
    for name, words in (("train_accuracy", "train"), ("val_accuracy", "validation")):
        parts += [] if row.get(name) is None else [f"{words} {100 * row[name]:.1f} %"]
    return ", ".join([*parts, f"rate {row['lr']:.3g}", duration(row["seconds"])])
