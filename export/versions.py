"""Versions of onnxruntime: the oldest that files and measurements need, and how one is written."""

from __future__ import annotations

Version = tuple[int, int]
OLDEST: Version = (1, 14)


def version_text(version: Version) -> str:
    """Return a version as text: ``1.17``."""
    return ".".join(map(str, version))
