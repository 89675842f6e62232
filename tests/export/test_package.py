"""The package imports for free, and its public names are what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import export

ROOT = Path(export.__file__).resolve().parent.parent

WITHOUT_RUNTIME = """
import sys
sys.modules["onnxruntime"] = None  # importing it fails
import numpy as np, tempfile, os
from pathlib import Path
import export
from quantizers.integer import *
grid = Grid(0.5, -128, 127)
nodes = (Quantize("q", ("x",), "a", grid), Shape("flat", ("a",), "f", op="flatten", attributes={"axis": 1}),
         Linear("fc", ("f",), "y", np.ones((2, 12), np.int8), 2, np.ones(1, np.float32), None))
view = IntegerView(nodes, {"a": grid, "f": grid}, ("x",), ("y",))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "n.onnx"
    exported = export.write_view(view, [(1, 3, 2, 2)], path)
    assert exported.opset == 17 and not exported.packed and path.exists()
    assert exported.warnings[0].startswith("not loaded: onnxruntime is missing"), exported.warnings
    assert export.write_view(view, [(1, 3, 2, 2)], path, pack="packed").packed
    try:
        export.measure_latency(path)
    except ImportError as error:
        assert "pip install onnxruntime" in str(error)
    else:
        raise SystemExit("no error")
print("passed")
"""


def test_public_names_are_sorted_and_resolve():
    assert export.__all__ == sorted(export.__all__)
    assert all(getattr(export, name) is not None for name in export.__all__)


def test_export_works_without_the_runtime():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RUNTIME], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "passed", done.stderr


@pytest.mark.parametrize("name", [path.name for path in sorted((ROOT / "export").glob("*.py"))])
def test_modules_open_with_a_sentence(name):
    first = (ROOT / "export" / name).read_text().splitlines()[0]
    assert first.startswith('"""') and first.rstrip('"').endswith(".")
