"""Pictures of made images for a run's report: samples by epoch, with what the teacher saw in them."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np

from qkd.files import read_json
from qkd.methods.data_free.making.samples import grid_png, read_arrays, sample_files

ACROSS = 16  # images a row
PLACES = {"generator": "", "student/float": "float twin", "student": "student"}  # folder -> whose training made them


def made_pictures(run_path: Path) -> dict[str, str]:
    """Return what a picture shows -> PNG file in base64; empty for a run that made no images.

    Args:
        run_path: The run folder.

    Raises:
        ValueError: If a sample is damaged.
    """
    pictures = {}
    for folder, role in PLACES.items():
        files = sample_files(run_path / folder)
        if files:
            rows = [np.asarray(read_arrays(path)["images"], np.uint8)[:ACROSS] for path in files]
            epochs = ", ".join(str(int(path.stem.rpartition("_")[2])) for path in files)
            whose = f" of the {role}'s training" if role else ""
            words = f"Samples{whose}, a row each for epoch {epochs}.{_seen(run_path / folder)}"
            pictures[words] = base64.b64encode(grid_png(rows)).decode("ascii")
    return pictures


def _seen(folder: Path) -> str:
    path = folder / "result.json"
    found = read_json(path) if folder.name == "generator" and path.is_file() else {}
    if "class_histogram" not in found:
        return ""
    return (
        f" {found['method']}, {found['steps']:,} steps; the teacher sees the classes {found['class_histogram']} times "
        f"in {found['images']} images, with a mean confidence of {found['mean_confidence']:.3f}."
    )
