"""The wheel's build backend (PEP 517): the toolkit of this checkout compiles the library and writes the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def build_wheel(
    wheel_directory: str, config_settings: dict[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    """Write the wheel and return its name; the setting ``target`` names another device."""
    from export.lowbit.deployment import build_wheel

    target = (config_settings or {}).get("target")
    return build_wheel(target, Path(wheel_directory)).path.name


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    """Refuse: the sources are the toolkit's, and this project holds none of them."""
    raise SystemExit("onnxruntime-ep-lowbit is distributed as wheels only: python -m build --wheel")
