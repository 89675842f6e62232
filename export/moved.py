"""Keep modules importable under their old names for a release: each import of one warns and says where it is now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class OldModules(MetaPathFinder, Loader):
    """Find modules under names that they had: the last place where Python looks, so that a new module comes first.

    Args:
        places: Old dotted name -> dotted name now.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = dict(places)
        self._own_specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that loads the module of today, or None for a name that no module had."""
        return ModuleSpec(fullname, self) if fullname in self.places else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of today, with a DeprecationWarning."""
        place = self.places[spec.name]
        text = f"the module {spec.name} is {place} now; the old name goes with the next release"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        module = importlib.import_module(place)
        self._own_specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import has replaced; it has run already."""
        old = module.__spec__.name if module.__spec__ is not None else ""
        module.__spec__ = self._own_specs.pop(old, module.__spec__)


def by_old_name(rooms: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Return old dotted name -> new one.

    Args:
        rooms: (package before, package now) -> names of modules, separated by spaces; ``old=new`` where it changed.
    """
    pairs = [
        (before, now, *name.partition("=")[::2]) for (before, now), names in rooms.items() for name in names.split()
    ]
    return {f"{before}.{old}": f"{now}.{new or old}" for before, now, old, new in pairs}


OLD_MODULES = by_old_name({
    ("export", "export.graph"): "shapes",
    ("export", "export.storage"): "packing blocked",
    ("export", "export.conversion"): "unblock",
    ("export", "export.passes"): "rewrite saturation",
    ("export", "export.models"): "student float_twin int8_baseline census",
    ("export", "export.parity"): "layer_parity=layers quant_session",
    ("export", "export.cost"): "program reading",
    ("export", "export.lowering"): "elementwise=functions",
    ("export", "export.devices"): "latency",
    ("export.devices", "export.devices.connections"): "address answer capture shell adb ssh",
    ("export.devices", "export.devices.onboard"): "runner",
})  # fmt: skip
sys.meta_path.append(OldModules(OLD_MODULES))
