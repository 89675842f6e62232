"""Read which onnxruntime ``--for`` names, and say what to write instead of a target."""

from __future__ import annotations

import re

from export.checks import ExportError
from export.targets.table import ONNXRUNTIME, TARGETS, find_target
from export.versions import OLDEST, Version, version_text

_ASKED = re.compile(rf"(?:{ONNXRUNTIME})?\s*(?:==)?\s*(\d{{1,3}})\.(\d{{1,3}})(?:\.\d{{1,4}})?")


def parse_runtime(text: str) -> Version:
    """Return the version that ``onnxruntime==1.17`` names.

    Raises:
        ExportError: If it does not name a version, or names one that is too old for any file.
    """
    match = _ASKED.fullmatch(text.strip())
    if match is None:
        raise ExportError(f"--for must be a version such as {ONNXRUNTIME}==1.17, got {text!r}{_way_of(text.strip())}")
    version = int(match.group(1)), int(match.group(2))
    if version < OLDEST:
        raise ExportError(
            f"{ONNXRUNTIME} {version_text(version)} is too old: files need at least {version_text(OLDEST)}"
        )
    return version


def _way_of(text: str) -> str:
    """Return what to write instead of a runtime that is a target, or a name or version of ONNX Runtime's."""
    try:
        target = find_target(text)
    except ValueError:
        known = TARGETS.get(text.lower())
        refused = known is not None and known.refusal
        return f"; target {text!r} is refused: {refused}" if refused else "; other runtimes are targets: qkd ls targets"
    if target.name == ONNXRUNTIME:
        return "; name the version that the device has"
    if target.oldest is not None:
        oldest = version_text(target.oldest)
        return f"; write {ONNXRUNTIME}=={oldest}, or 'export.target={target.name}' for student.onnx itself"
    file = "student.onnx itself is then" if target.is_onnxruntime else f"student.{target.name}.onnx is"
    return f"; {target.name} is a target: `qkd export RUN export.target={target.name}` ({file} the file for it)"
