"""Find the exported file that a user names: an ONNX file, or a run, which stands for its student."""

from __future__ import annotations

import shlex
from pathlib import Path

from qkd.failures import UsageError
from qkd.run.target import run_folder, runs_in

STUDENT = Path("export") / "student.onnx"


def model_file(target: str, runs_dir: Path) -> Path:
    """Return the ONNX file that is meant.

    Args:
        target: A file; a run folder, or the name of one in ``runs_dir``.
        runs_dir: Folder of run folders.

    Raises:
        UsageError: If there is none.
    """
    path = Path(target)
    if path.is_file():
        return path
    folder = run_folder(target, runs_dir)
    if folder is None:
        raise UsageError(f"{target}: neither an ONNX file nor a run folder, nor the name of a run; {runs_in(runs_dir)}")
    if not (folder / STUDENT).is_file():
        raise UsageError(f"{folder}: has no {STUDENT} yet; `qkd export {shlex.quote(str(folder))}` writes it")
    return folder / STUDENT
