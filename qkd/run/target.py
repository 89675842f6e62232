"""Find the run that the user names on the command line."""

from __future__ import annotations

import os
from pathlib import Path

from qkd.failures import UsageError

MOST_NAMED = 8  # of the runs that exist, in a message
# files that a run keeps beside its stages' folders
OWN_FILES = {".lock", "config.yaml", "data.json", "environment.json", "report.html", "report.md", "run.log"}


def run_folder(target: str, runs_dir: Path) -> Path | None:
    """Return the run folder given by a path or by its name in ``runs_dir``; None if there is no such folder."""
    for folder in (Path(target), runs_dir / target):
        if (folder / "config.yaml").is_file():
            return folder
    return None


def require_run_folder(target: str, runs_dir: Path) -> Path:
    """Return :func:`run_folder`.

    Raises:
        UsageError: If there is no such run; the message lists some existing ones.
    """
    folder = run_folder(target, runs_dir)
    if folder is not None:
        return folder
    raise UsageError(f"{target} is neither a run folder nor the name of a run; {runs_in(runs_dir)}")


def runs_in(runs_dir: Path, option: str = " (see --runs-dir)") -> str:
    """Return, for a message, which runs exist.

    Args:
        runs_dir: Folder of run folders.
        option: How to name another one.
    """
    known = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    more = f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    there = f"{runs_dir} has: {', '.join(known[:MOST_NAMED])}{more}" if known else f"{runs_dir} has none"
    return there + option


def run_of(file: Path) -> Path | None:
    """Return the run that a file belongs to, by its place; None if it belongs to none.

    Every file of a stage's folder does, whether it exists or not: stages read whatever is there.

    Args:
        file: Its path.
    """
    path = Path(os.path.realpath(file))
    for folder in path.parents:
        if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file():
            return folder if path.parent != folder or path.name in OWN_FILES else None
    return None


def require_place(runs_dir: Path, name: str) -> None:
    """Raise before anything is trained if a run's folder cannot be created.

    Args:
        runs_dir: Folder of run folders.
        name: Of the run; a folder of it that exists is looked at when it is opened.

    Raises:
        UsageError: If ``runs_dir``, or the nearest folder above it that exists, is a file or cannot be written to.
    """
    if (runs_dir / name).exists():
        return
    there = next((folder for folder in (runs_dir, *runs_dir.absolute().parents) if folder.exists()), None)
    if there is not None and not there.is_dir():
        raise UsageError(f"--runs-dir {runs_dir}: {there} is not a folder")
    if there is not None and not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"--runs-dir {runs_dir}: {there} cannot be written to; name another folder")
