"""Modules under their old names, for a release."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import export.moved
import qkd.moved

PLACES = {**export.moved.OLD_MODULES, **qkd.moved.OLD_MODULES}


@pytest.mark.parametrize("old", sorted(PLACES))
def test_a_module_is_found_under_its_old_name(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(PLACES[old])
    spec = module.__spec__
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"the module {old} is {PLACES[old]} now"):
        assert importlib.import_module(old) is module
    assert module.__spec__ is spec and module.__name__ == PLACES[old]
    parent, _, name = old.rpartition(".")
    monkeypatch.delattr(sys.modules[parent], name, raising=False)


def test_a_name_that_no_module_had_is_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="qkd.bindings"):
        importlib.import_module("qkd.bindings")


def test_names_of_an_old_module_are_imported_as_before() -> None:
    code = "from qkd.binding import load_config; import export.packing as p; print(load_config.__module__, p.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "qkd.config.binding export.storage.packing\n"
