"""Which files a runtime may be measured with: a student is written for one; others compute it differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike

import onnx

from export.devices.providers import RUNTIMES, Entry
from export.storage.metadata import properties_of


def suited(entries: Sequence[Entry], paths: Mapping[str, str | PathLike[str]]) -> tuple[Entry, ...]:
    """Return the entries whose file is for their runtime; float files are for all.

    Args:
        entries: Every model under every provider.
        paths: Name -> ONNX file.

    Raises:
        ValueError: If nothing is left of the request; the message says what to do.
    """
    runtimes = _runtimes_of(entries)
    if not runtimes:
        return tuple(entries)
    targets = {name: target_name(path) for name, path in paths.items()}
    kept = tuple(entry for entry in entries if _suits(entry.provider, targets[entry.model]))
    for runtime in sorted(runtimes):
        if not any(entry.provider == runtime for entry in kept):
            names = ", ".join(str(path) for path in paths.values())
            raise ValueError(
                f"{names}: none of these files is for {runtime}, which computes others differently; export one with "
                f"export.target={runtime} (API: export_onnx(..., target={runtime!r}))"
            )
    return kept


def without_student(entries: Sequence[Entry], paths: Mapping[str, str | PathLike[str]]) -> list[str]:
    """Return a sentence for each runtime that is left with float files, although there are students.

    Args:
        entries: What :func:`suited` returned.
        paths: Name -> ONNX file.
    """
    runtimes = _runtimes_of(entries)
    if not runtimes:
        return []
    targets = {name: target_name(path) for name, path in paths.items()}
    if not any(targets.values()):
        return []
    measured = {entry.provider for entry in entries if targets[entry.model]}
    return [
        f"no student here is for {runtime}, so only float files are measured there; export one with "
        f"export.target={runtime}"
        for runtime in sorted(runtimes - measured)
    ]


def target_name(path: str | PathLike[str]) -> str | None:
    """Return the target that a student's file was written for, ``onnxruntime`` if it names none; None for others."""
    try:
        properties = properties_of(onnx.load(path, load_external_data=False))
    except Exception:  # protobuf's error; whoever opens the file says what is wrong
        return None
    return properties.get("target", "onnxruntime") if "quantizers" in properties else None


def _runtimes_of(entries: Sequence[Entry]) -> set[str]:
    return {entry.provider for entry in entries} & RUNTIMES.keys()


def _suits(provider: str, target: str | None) -> bool:
    if target is None:
        return True
    return target == provider if provider in RUNTIMES else target not in RUNTIMES
