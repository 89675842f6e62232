"""Packages that import what they export when it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import export
import qkd.nets


def test_an_export_is_the_one_of_its_module() -> None:
    from export.models.student import export_onnx

    assert export.export_onnx is export_onnx


def test_dir_lists_what_is_not_yet_imported() -> None:
    assert set(export.__all__) <= set(dir(export))
    assert set(qkd.nets.__all__) <= set(dir(qkd.nets))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'export' has no attribute 'exprot_onnx'"):
        export.exprot_onnx  # noqa: B018


@pytest.mark.parametrize(
    "package", ["export", "export.devices", "qkd.agents", "qkd.data", "qkd.losses", "qkd.nets", "qkd.terms"]
)
def test_no_export_has_the_name_of_a_module_beside_it(package: str) -> None:
    # importing the module would put it in the place of the export
    folder = Path(__file__).parent.parent.parent.joinpath(*package.split("."))
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names & modules - {"on_demand", "moved"} == set()


def test_a_star_import_brings_everything() -> None:
    code = "from export import *; print(export_onnx.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "export_onnx\n"
