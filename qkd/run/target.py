"""Find the run that a person names on the command line."""

from __future__ import annotations

from pathlib import Path

from qkd.failures import UsageError


def run_folder(target: str, runs_dir: Path) -> Path | None:
    """Return the run folder that is meant: a path, or the name of one in ``runs_dir``; None where it is neither."""
    for folder in (Path(target), runs_dir / target):
        if (folder / "config.yaml").is_file():
            return folder
    return None


def require_run_folder(target: str, runs_dir: Path) -> Path:
    """Return :func:`run_folder`.

    Raises:
        UsageError: If there is no such run; lists some that are there.
    """
    folder = run_folder(target, runs_dir)
    if folder is not None:
        return folder
    raise UsageError(f"{target}: no run folder, and no run of that name; {runs_in(runs_dir)}")


def runs_in(runs_dir: Path) -> str:
    """Return, for a message, what runs there are."""
    known = sorted(path.parent.name for path in runs_dir.glob("*/config.yaml"))
    there = f"{runs_dir} has: {', '.join(known[:8])}" if known else f"{runs_dir} has none"
    return f"{there} (see --runs-dir)"
