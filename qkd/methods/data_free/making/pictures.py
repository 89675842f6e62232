"""Pictures of made images for a run's report: samples by epoch, with what the teacher saw in them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qkd.methods.data_free.making.samples import epoch_of, grid_png, read_sample, sample_files
from qkd.report.charts import histogram_chart
from qkd.report.records import read_record

ACROSS = 16  # images per row
PLACES = {"generator": "", "student/float": "float twin", "student": "student"}  # folder -> whose training made them


def made_pictures(run_path: Path) -> dict[str, str]:
    """Return a dict of caption -> PNG file in base64; empty for a run that made no images.

    Args:
        run_path: The run folder.

    Raises:
        ValueError: If a sample, or what the teacher saw, is damaged.
    """
    pictures = {}
    for folder, role in PLACES.items():
        files = sample_files(run_path / folder)
        if files:
            rows = [read_sample(path)[:ACROSS] for path in files]
            epochs = ", ".join(str(epoch_of(path)) for path in files)
            whose = f" of the {role}'s training" if role else ""
            words = f"Samples{whose}, one row per epoch: {epochs}.{'' if role else _seen(run_path)}"
            pictures[words] = base64.b64encode(grid_png(rows)).decode("ascii")
    return pictures


def made_histogram(run_path: Path) -> Markup | None:
    """Return a chart of how often the teacher sees each class; None for a run without a generator or pool.

    Args:
        run_path: The run folder.

    Raises:
        DamagedFileError: If what the teacher saw is damaged.
    """
    found = seen_by_teacher(run_path)
    if not found:
        return None
    title = f"generator: classes that the teacher sees in {found['images']:,} images"
    return histogram_chart(title, found["class_histogram"], x_label="class")


def seen_by_teacher(run_path: Path) -> dict[str, Any]:
    """Return the result of a run's generator or pool; empty if it has none.

    Args:
        run_path: The run folder.

    Raises:
        DamagedFileError: If it is damaged.
    """
    path = run_path / "generator" / "result.json"
    found = read_record(path) if path.is_file() else {}
    return found if "class_histogram" in found else {}


def _seen(run_path: Path) -> str:
    found = seen_by_teacher(run_path)
    if not found:
        return ""
    counts = found["class_histogram"]
    return (
        f" {found['method']}, {found['steps']:,} steps; the teacher sees each class {min(counts):,} to {max(counts):,} "
        f"times in {found['images']:,} images, with a mean confidence of {found['mean_confidence']:.3f}."
    )
