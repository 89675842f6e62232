"""The student's files that an earlier export wrote for other runtimes: those of the same student are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qkd.files import DamagedFileError
from qkd.progress import Progress
from qkd.report.records import read_record
from qkd.run.folder import RunFolder
from qkd.training.assembly import WEIGHTS


class Kept(NamedTuple):
    """What is kept from an earlier export: the files, each with its comparison, and their entries of ``export.json``.

    ``target`` is the target that ``student.onnx`` was written for then, if it had one.
    """

    files: list[Path]
    facts: dict[str, Any]
    target: str | None = None


def keep_proven(run: RunFolder, written: Collection[str], progress: Progress) -> Kept:
    """Keep the student's other files that are proven to be this student; delete those of another student.

    A file is kept if the manifest of an earlier export names it and its comparison, both are unchanged, and that
    export was made from the student's current weights. Files that no export of this run wrote are left alone.

    Args:
        run: The open run folder, with a trained student.
        written: Names, without suffix, that the export is about to write.
        progress: Where to report what is kept, and what is deleted and why.

    Returns:
        What is kept.

    Raises:
        OSError: If a file cannot be read or deleted.
    """
    folder = run.folder("export")
    facts = _facts(folder)
    unchanged = run.unchanged_files("export", run.path / "student" / WEIGHTS)
    kept = Kept([], {}, facts.get("student", {}).get("target"))
    for path in sorted(folder.glob("student.*.onnx")):
        name, parity = path.stem, parity_file(folder, path.stem)
        if name in written:
            continue
        if name in facts and {path, parity} <= unchanged:
            kept.files.extend((path, parity))
            kept.facts[name] = facts[name]
        elif name in facts:
            path.unlink()
            parity.unlink(missing_ok=True)
            progress.warn(f"{path.name} has been deleted: it was not proven to be this run's current student")
        else:
            progress.warn(f"{path.name} is not in any record of this run's exports, so it is left alone")
    if kept.facts:
        names = ", ".join(f"{name}.onnx" for name in kept.facts)
        progress.say(f"kept from an earlier export, of the same student: {names}")
    return kept


def parity_file(folder: Path, name: str) -> Path:
    """Return the path of the comparison of a student's file, given by its name without the suffix."""
    return folder / f"{name.replace('student', 'parity')}.json"


def _facts(folder: Path) -> Mapping[str, Any]:
    try:
        return read_record(folder / "export.json")
    except (FileNotFoundError, DamagedFileError):
        return {}
