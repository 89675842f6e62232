"""Files of a run that are repacked for an older onnxruntime, stored next to the others and proven like them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from export import ExportError
from export.conversion.repack import fit_storage
from export.storage.needs import RUNTIME, needed_runtime, needs_text, storage_for
from export.targets import find_target
from export.targets.asked import parse_runtime
from export.versions import AMX, Version, arithmetic_note, version_text
from export.writing import write_whole
from qkd.files import read_json, sha256_of, write_json
from qkd.predicting.feeding import PIXELS
from qkd.progress import Progress
from qkd.roles.images import run_images
from qkd.roles.nets import load_student
from qkd.run.folder import RunFolder
from qkd.stages.export import StudentFile, compare_file, judge_file, student_files, write_parity
from qkd.training import cpu_threads


def keep_fitted(run: RunFolder, runtime: str, progress: Progress) -> list[Path]:
    """Write each of the student's files for ONNX Runtime again, in a form that an older onnxruntime loads.

    Args:
        run: A run folder with a complete export stage, locked by this process.
        runtime: ``onnxruntime==1.17``.
        progress: Where to report what was written.

    Returns:
        The files; empty if the existing ones already fit.

    Raises:
        export.ExportError: If ``runtime`` does not name a version, or a file cannot be repacked for it.
        export.ParityError: If a repacked file is not proven to be the student.
    """
    version = parse_runtime(runtime)
    if note := arithmetic_note(version_text(version), [AMX]):  # which processor it will run on is unknown
        progress.warn(note)
    files = [name for name, file in student_files(run.config).items() if _is_for_onnxruntime(file)]
    return [path for name in files if (path := _keep(run, name, version, progress)) is not None]


def _is_for_onnxruntime(file: StudentFile) -> bool:
    return file.flavor == "ort" and (file.target is None or find_target(file.target).is_onnxruntime)


def _keep(run: RunFolder, name: str, version: Version, progress: Progress) -> Path | None:
    folder, text = run.path / "export", f"{RUNTIME} {version_text(version)}"
    source = folder / f"{name}.onnx"
    needed = needed_runtime(onnx.load(source))
    if needed is not None and needed <= version:
        progress.say(f"{source.name} already runs on {text}: it needs {version_text(needed)}")
        return None
    fitted = fit_storage(source, storage_for(version))
    if isinstance(fitted.content, Path):
        raise ExportError(f"{source} cannot run on {text}, and repacking would not change that")
    path = folder / f"{_name_of(name, version)}.onnx"
    write_whole(path, fitted.content)
    files = [path, *_prove(run, path, progress)]
    facts = read_json(folder / "export.json")
    write_json(folder / "export.json", {**facts, path.stem: _facts(path, facts[name], version)})
    run.extend("export", [*files, folder / "export.json"])
    progress.say(f"{path.name} {path.stat().st_size:,} bytes, for {text}: weights in {', '.join(fitted.repacked)}")
    return path


def _name_of(name: str, version: Version) -> str:
    ending = f".{PIXELS}" if name.endswith(f".{PIXELS}") else ""
    return f"student.{RUNTIME}-{version_text(version)}{ending}"


def _prove(run: RunFolder, path: Path, progress: Progress) -> list[Path]:
    with cpu_threads(run.config.threads):
        splits = run_images(run, progress)
        report = compare_file(load_student(run), path, splits, run.config, progress)
    written = write_parity(path.parent, path.stem, report)
    judge_file(path.stem, report, progress)
    return [written]


def _facts(path: Path, source: dict[str, Any], version: Version) -> dict[str, Any]:
    return {
        **{key: source[key] for key in ("flavor", "fall_backs", "takes_pixels") if key in source},
        "path": path.name,
        "sha256": sha256_of(path),
        "size_bytes": path.stat().st_size,
        "needs": needs_text(onnx.load(path)),
        "fitted_to": version_text(version),
    }
