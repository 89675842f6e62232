"""The student's files that an earlier export wrote for other runtimes: those of the same student stay."""

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
    """What stays of an earlier export: the files, each with its comparison, and their entries of ``export.json``.

    ``target`` is the one that ``student.onnx`` was written for then, where that had one.
    """

    files: list[Path]
    facts: dict[str, Any]
    target: str | None = None


def keep_proven(run: RunFolder, written: Collection[str], progress: Progress) -> Kept:
    """Keep the student's other files that are proven to be this student; delete those of another one.

    A file stays where the manifest of an earlier export names it and its comparison, both are unchanged, and that
    export was made from the weights that the student has now. What no export of this run wrote is left alone.

    Args:
        run: The run folder, open, with a trained student.
        written: Names, without their ending, that the export is about to write.
        progress: Where to say what stays, and what is deleted and why.

    Returns:
        What stays.

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
            progress.warn(f"{path.name} is deleted: it was not proven to be the student that this run has now")
        else:
            progress.warn(f"{path.name} is in no record of this run's exports: left alone, not known to be its student")
    if kept.facts:
        names = ", ".join(f"{name}.onnx" for name in kept.facts)
        progress.say(f"kept from an earlier export, of the same student: {names}")
    return kept


def parity_file(folder: Path, name: str) -> Path:
    """Return where the comparison of a file of the student is, given by its name without the ending."""
    return folder / f"{name.replace('student', 'parity')}.json"


def _facts(folder: Path) -> Mapping[str, Any]:
    try:
        return read_record(folder / "export.json")
    except (FileNotFoundError, DamagedFileError):
        return {}
