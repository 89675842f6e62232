"""The flavors by name."""

from __future__ import annotations

from export.checks import ExportError
from export.flavors.base import Flavor
from export.flavors.ort import OrtFlavor
from export.flavors.plain import QcdqFlavor
from export.flavors.quant_nodes import QonnxFlavor

FLAVORS: dict[str, Flavor] = {"ort": OrtFlavor(), "qcdq": QcdqFlavor(), "qonnx": QonnxFlavor()}


def find_flavor(name: str) -> Flavor:
    """Return the flavor with this name.

    Args:
        name: A key of ``FLAVORS``.

    Returns:
        How that flavor writes quantizers and layers.

    Raises:
        ExportError: If it is unknown.
    """
    if name not in FLAVORS:
        raise ExportError(f"flavor must be one of {', '.join(FLAVORS)}, got {name!r}")
    return FLAVORS[name]
