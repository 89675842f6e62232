"""The command ``qkd generate``: a picture of a data-free run's generated images by epoch, and some fresh ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qkd.failures import UsageError
from qkd.files import write_bytes
from qkd.methods.data_free.making.pictures import seen_by_teacher
from qkd.methods.data_free.making.samples import epoch_of, grid_png, read_sample, sample_files, to_pixels
from qkd.methods.data_free.method import DataFree
from qkd.progress import Silent
from qkd.roles.images import stored_images
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.target import require_run_folder
from qkd.seeding import stream
from qkd.training.assembly import Context

FOLDERS = ("generator", "student", "student/float")  # folders of samples; the first with any is used


@dataclass(frozen=True)
class GenerationReport:
    """The result of ``qkd generate``.

    Args:
        name: Name of the run.
        method: The value of ``student.data_free.method``.
        out: The picture.
        rows: Description of each of its rows, from the top.
        folder: Folder of the training with these samples, in the run folder; empty if there are none.
        found: What the teacher saw in the images of a generator or pool; empty if there is none.
    """

    name: str
    method: str
    out: Path
    rows: tuple[str, ...]
    folder: str
    found: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        own = {"name": self.name, "method": self.method, "out": str(self.out), "rows": list(self.rows)}
        return {**own, "folder": self.folder, **self.found}

    def to_text(self) -> str:
        """Return a few lines."""
        whose = f"samples of {self.folder}/" if self.folder else "no training has samples"
        lines = [f"{self.out}: images of {self.name} ({self.method}; {whose}), rows: {', '.join(self.rows)}"]
        if self.found:
            lines.append(f"classes that the teacher sees in them: {self.found['class_histogram']}")
        return "\n".join(lines)


def generate_target(target: str, *, runs_dir: Path, out: Path, count: int = 16, seed: int = 0) -> GenerationReport:
    """Draw images of a data-free run.

    Args:
        target: A run folder, or the name of one in ``runs_dir``.
        runs_dir: Folder of run folders.
        out: PNG file to write.
        count: Images per row.
        seed: Seed of the fresh images.

    Raises:
        UsageError: If there is no such run, it is not data-free, or it has no images yet.
        ValueError: If a file is damaged.
        OSError: If the picture cannot be written.
    """
    if out.suffix != ".png":
        raise UsageError(f"--out must be a PNG file, got {out}")
    folder = require_run_folder(target, runs_dir)
    run = RunFolder(stored_config(folder), folder.resolve())
    settings = run.config.student.data_free
    if settings is None:
        raise UsageError(f"{folder}: has no student.data_free, so it makes no images")
    place = next((name for name in FOLDERS if sample_files(run.path / name)), "")
    files = sample_files(run.path / place) if place else []
    rows = {f"epoch {epoch_of(path)}": read_sample(path)[:count] for path in files}
    if settings.made_once or settings.without_training:  # others are discarded after training
        rows["fresh"] = _fresh(run, count, seed)
    if not rows:
        raise UsageError(f"{folder}: has made no images yet: run `qkd distill` with its config first")
    write_bytes(out, grid_png(list(rows.values())))
    return GenerationReport(run.config.name, settings.method, out, tuple(rows), place, seen_by_teacher(run.path))


def _fresh(run: RunFolder, count: int, seed: int) -> npt.NDArray[np.uint8]:
    splits = stored_images(run.config, run.path)
    context = Context(run, splits, torch.device("cpu"), Silent())
    try:
        images, _ = DataFree(run.config).synthesis(context).draw(count, stream(seed, "generate"))
    except FileNotFoundError as error:
        raise UsageError(f"{error}; `qkd distill` with the run's config makes what is missing") from error
    pixels: npt.NDArray[np.uint8] = to_pixels(images, splits.mean, splits.std).numpy()
    return pixels
