"""Write files whole or not at all."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from export.atomic import replace_file
from export.checks import ExportError


def checked_target(path: str | PathLike[str]) -> Path:
    """Return the path after checking that a file can be written there.

    Raises:
        ExportError: If it is a folder, or its folder does not exist.
    """
    target = Path(path)
    if target.is_dir():
        raise ExportError(f"{target} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise ExportError(f"the folder {target.parent} does not exist; create it first")
    return target


def write_whole(target: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ExportError: If that fails (disk full, folder not writable, the name of a device); nothing is left behind, and
            an existing file is untouched.
    """
    try:
        replace_file(target, content)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ExportError(f"cannot write {target}: {reason}") from error
