"""The flavours by name."""

from __future__ import annotations

from export.checks import ExportError
from export.flavours.base import Flavour
from export.flavours.ort import OrtFlavour
from export.flavours.plain import QcdqFlavour
from export.flavours.quant_nodes import QonnxFlavour

FLAVOURS: dict[str, Flavour] = {"ort": OrtFlavour(), "qcdq": QcdqFlavour(), "qonnx": QonnxFlavour()}


def find_flavour(name: str) -> Flavour:
    """Return the flavour of that name.

    Args:
        name: A key of ``FLAVOURS``.

    Returns:
        How that flavour writes quantizers and layers.

    Raises:
        ExportError: If it is unknown.
    """
    if name not in FLAVOURS:
        raise ExportError(f"flavour must be one of {', '.join(FLAVOURS)}, got {name!r}")
    return FLAVOURS[name]
