"""Modules under their old names, for a release."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import export.moved
import qkd.moved

PLACES = {**export.moved.OLD_MODULES, **qkd.moved.OLD_MODULES}


@pytest.fixture
def forgotten(old: str) -> Iterator[str]:
    """An old name that has not been imported, and is not after the test."""
    parent, _, name = old.rpartition(".")

    def forget() -> None:
        sys.modules.pop(old, None)
        vars(importlib.import_module(parent)).pop(name, None)

    forget()
    yield old
    forget()


@pytest.mark.parametrize("old", sorted(PLACES))
def test_a_module_is_found_under_its_old_name(forgotten: str) -> None:
    module = importlib.import_module(PLACES[forgotten])
    spec = module.__spec__
    with pytest.warns(DeprecationWarning, match=f"the module {forgotten} is {PLACES[forgotten]} now"):
        assert importlib.import_module(forgotten) is module
    assert module.__spec__ is spec and module.__name__ == PLACES[forgotten]


def test_the_tables_hold_what_moved() -> None:
    """Names of 0.1.0 that a table written from memory left out."""
    left_out = {
        "export.elementwise", "export.layer_parity", "qkd.data.arrays", "qkd.data.digits", "qkd.data.folder",
        "qkd.data.vision", "qkd.stages.auxiliary",
    }  # fmt: skip
    assert left_out <= set(PLACES) and len(PLACES) > 90
    assert not set(PLACES) & {"export.metadata", "export.windows", "qkd.data.facts", "qkd.user_paths"}, "never were"


def test_a_name_that_no_module_had_is_an_import_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="qkd.bindings"):
        importlib.import_module("qkd.bindings")


def test_names_of_an_old_module_are_imported_as_before() -> None:
    code = "from qkd.binding import load_config; import export.packing as p; print(load_config.__module__, p.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "qkd.config.binding export.storage.packing\n"
