"""Paths as users write them: a leading ``~`` is the home folder, in configs, overrides and arguments."""

from __future__ import annotations

from pathlib import Path


def looked_in(path: str | Path) -> str:
    """Return where a relative path was looked for, since the config that names it may be elsewhere.

    Args:
        path: As written.

    Returns:
        Words that follow the path; empty if it is absolute.
    """
    return "" if user_path(path).is_absolute() else f" in {Path.cwd()} (paths are relative to the current folder)"


def user_path(text: str | Path) -> Path:
    """Return the path that the user means.

    A ``~`` whose home folder is not known stays unchanged: what cannot be found is then named as written.

    Args:
        text: A path as written.

    Example:
        >>> user_path("~/set") == Path.home() / "set"
        True
    """
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path
