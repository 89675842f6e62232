"""Whole runs from Python: train, and open a finished run."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from qkd.checking import file_faults, name_faults, term_use_faults
from qkd.config import RunConfig
from qkd.config.binding import apply_overrides, bind, load_config
from qkd.data import Splits
from qkd.failures import ConfigError, UsageError
from qkd.nets.own.copies import resolved_nets
from qkd.pipeline import run_stages
from qkd.pipeline.running import NEEDS, look_ahead, refuse_clients
from qkd.pipeline.siblings import beside
from qkd.progress import Progress
from qkd.report import RunSummary, summarize
from qkd.roles.images import stored_images
from qkd.roles.nets import load_student, load_teacher
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.log import logged
from qkd.run.target import runs_in
from quantizers import Student

STAGES = tuple(NEEDS)  # in the order of an experiment


class Run:
    """A run folder as Python objects: its nets, its images, its report. Printing it shows the closing table.

    Args:
        path: The run folder.

    Raises:
        ConfigError: If it is not a run folder.
        ValueError: If its config is not of this version.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).resolve()
        if not (self.path / "config.yaml").is_file():
            raise ConfigError([f"{self.path}: is not a run folder; {runs_in(self.path.parent, option='')}"])
        self.config: RunConfig = stored_config(self.path)

    @cached_property
    def teacher(self) -> nn.Module:
        """The teacher, in eval mode, on the CPU."""
        return load_teacher(self._folder)

    @cached_property
    def student(self) -> Student:
        """The student in its deployed arithmetic, the same as in the exported file, on the CPU."""
        return load_student(self._folder)

    @property
    def report(self) -> RunSummary:
        """The run's results so far: accuracies, parity, sizes, latencies."""
        return summarize(self.path)

    @property
    def onnx(self) -> Path:
        """Path of the exported student, which exists once the export stage is done."""
        return self.path / "export" / "student.onnx"

    def images(self) -> Splits:
        """Return the run's images: ``train``, ``val``, ``test``, ``mean``, ``std``, ``classes``.

        Raises:
            qkd.data.DataError: If they cannot be read, or are not those that the run was started with.
        """
        return stored_images(self.config, self.path)

    @property
    def _folder(self) -> RunFolder:
        return RunFolder(self.config, self.path)

    def __str__(self) -> str:
        """Return the closing table."""
        return self.report.to_text()

    def __repr__(self) -> str:
        """Return the closing table for a notebook or a prompt."""
        return f"<Run {self.path}>\n{self}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def run(
    config: str | PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    runs_dir: str | PathLike[str] = "runs",
    until: str = "report",
    progress: Progress | None = None,
) -> Run:
    """Run an experiment, resuming where it stopped, as ``qkd run`` does.

    Args:
        config: A YAML file, the name of a shipped config, a config's content as a mapping, or a bound config.
        overrides: ``{"student.train.epochs": 3}``, or strings like ``student.train.epochs=3``.
        runs_dir: Folder of run folders.
        until: The last stage: teacher, search, distill, export, bench or report.
        progress: Where to report; default: stderr. ``qkd.progress.Silent()`` prints nothing.

    Returns:
        The run; it prints as a short table.

    Raises:
        ConfigError: With every fault of the config.
        UsageError: If there is no stage of that name, or the config is for federated training (``federated``).
        ValueError: If data, nets or the folder cannot be used.
        RuntimeError: If training diverges, or the exported file does not match the student.
        TypeError: If the student's parameters are not float32.
        OSError: If a file cannot be read or written.
    """
    if until not in STAGES:
        raise UsageError(f"until must be one of {', '.join(STAGES)}, got {until!r}")
    names, folder, progress = STAGES[: STAGES.index(until) + 1], Path(runs_dir), progress or Progress()
    made = bound(config, overrides)
    refuse_clients(made)
    made = beside(made, folder, progress)
    look_ahead(made, folder / made.name, names, lambda: bound(config, overrides, with_files=True), progress)
    with RunFolder.open(made, folder) as opened, logged(progress, opened.path, f"qkd.run: {', '.join(names)}"):
        run_stages(opened, names, progress)
        return Run(opened.path)


def load_run(folder: str | PathLike[str]) -> Run:
    """Return an existing run: ``run.teacher``, ``run.student``, ``run.report``.

    Args:
        folder: A run folder.

    Returns:
        The run; printing it shows the closing table.

    Raises:
        ConfigError: If it is not a run folder.
        ValueError: If its config is not of this version.
    """
    return Run(folder)


def bound(
    config: str | PathLike[str] | Mapping[str, Any] | RunConfig,
    overrides: Mapping[str, Any] | Iterable[str] = (),
    *,
    with_files: bool = False,
) -> RunConfig:
    """Return the config given in any of these forms.

    Args:
        config: As for :func:`run`.
        overrides: Likewise.
        with_files: Whether to also check that the files it names exist.

    Raises:
        ConfigError: With every fault.
    """
    pairs = overrides.items() if isinstance(overrides, Mapping) else ()
    texts = [f"{key}={json.dumps(value)}" for key, value in pairs] or list(overrides)
    checks = (name_faults, file_faults) if with_files else (name_faults,)
    new = () if isinstance(config, RunConfig) else (term_use_faults,)  # one that is bound may be a run's own
    if isinstance(config, RunConfig):
        config = config.model_dump(mode="json")
    if not isinstance(config, Mapping):
        return load_config(Path(config), texts, checks=checks, new=(term_use_faults,))
    return bind(resolved_nets(apply_overrides(config, texts), Path()), checks=checks, new=new)
