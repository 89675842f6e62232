"""Keep old names for a release: modules that have moved, names in British spelling. Each use warns."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

Taken = ParamSpec("Taken")
Result = TypeVar("Result")


def warn_of_old(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that a name has changed."""
    text = f"{old} is {new} now; the old name will be removed in the next release"
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)


class OldFields:
    """A value whose fields can also be read under their British spelling."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return getattr(self, old_names(type(self).__name__)(name))


class OldModules(MetaPathFinder, Loader):
    """Find modules under their old names; Python looks here last, so that new modules take precedence.

    Args:
        places: Old dotted name -> new dotted name.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = dict(places)
        self._own_specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that loads the module under its new name, or None if no module had this name."""
        return ModuleSpec(fullname, self) if fullname in self.places else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module under its new name, with a DeprecationWarning."""
        place = self.places[spec.name]
        warn_of_old(f"the module {spec.name}", place)
        module = importlib.import_module(place)
        self._own_specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import has replaced; the module has already run."""
        old = module.__spec__.name if module.__spec__ is not None else ""
        module.__spec__ = self._own_specs.pop(old, module.__spec__)


def by_old_name(rooms: Mapping[tuple[str, str], str]) -> dict[str, str]:
    """Return old dotted name -> new one.

    Args:
        rooms: (old package, new package) -> names of modules, separated by spaces; ``old=new`` if a name changed.
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
    ("export", "quantizers.native"): "compiled=building",
    ("export.devices", "export.devices.connections"): "address answer capture shell adb ssh",
    ("export.devices", "export.devices.onboard"): "runner",
})  # fmt: skip
# Ahead of Python's finders, which would find a second copy of `export.flavors.ort` under the name `export.flavours`.
OLD_ROOMS = by_old_name({
    ("export", "export"): "flavours=flavors",
    ("export.flavours", "export.flavors"): "base ort plain quant_nodes table",
})  # fmt: skip
sys.meta_path.insert(0, OldModules(OLD_ROOMS))
sys.meta_path.append(OldModules(OLD_MODULES))

OLD_NAMES: dict[str, dict[str, str]] = {  # module -> name in British spelling -> new name
    "export.flavors": {
        "FLAVOURS": "FLAVORS", "Flavour": "Flavor", "OrtFlavour": "OrtFlavor", "QcdqFlavour": "QcdqFlavor",
        "QonnxFlavour": "QonnxFlavor", "find_flavour": "find_flavor",
    },
    "ExportedModel": {"flavour": "flavor"},
}  # fmt: skip
OLD_ARGUMENTS = {"flavour": "flavor"}
OLD_KEYS = {"flavour": "flavor"}  # of metadata and JSON


def old_names(owner: str) -> Callable[[str], str]:
    """Return a function that maps an old name to the new one, with a warning.

    Args:
        owner: Dotted name of the module or class whose names they are.

    Returns:
        A function that raises AttributeError for any other name.
    """

    def find(name: str) -> str:
        new = OLD_NAMES.get(owner, {}).get(name)
        if new is None:
            raise AttributeError(f"{owner!r} has no attribute {name!r}")
        warn_of_old(f"{owner}.{name}", f"{owner}.{new}", stacklevel=4)
        return new

    return find


def by_old_spelling(module: str) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that finds its names under their British spelling.

    Args:
        module: Its ``__name__``.
    """
    today = old_names(module)
    return lambda name: getattr(sys.modules[module], today(name))


def takes_old_arguments(function: Callable[Taken, Result]) -> Callable[Taken, Result]:
    """Let a function take keyword arguments under their British spelling, with a warning."""

    @functools.wraps(function)
    def call(*args: Taken.args, **options: Taken.kwargs) -> Result:
        for old, new in OLD_ARGUMENTS.items():
            if old in options:
                if new in options:
                    raise TypeError(f"{function.__name__}() got both {new!r} and its old name {old!r}; drop {old!r}")
                warn_of_old(f"the argument {old!r} of {function.__name__}()", repr(new))
                options[new] = options.pop(old)
        return function(*args, **options)

    return call


def with_new_key(key: str) -> str:
    """Return the current name of a metadata key that an earlier version wrote."""
    return OLD_KEYS.get(key, key)


def with_new_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an earlier version wrote, under the current keys."""
    return {with_new_key(key): value for key, value in values.items()}
