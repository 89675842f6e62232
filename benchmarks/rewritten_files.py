"""Shows what tools that rewrite ONNX files do to a packed student: its outputs, its size and its weights' type.

pip install onnxslim
python benchmarks/rewritten_files.py --json benchmarks/results/rewritten_files.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from export import export_onnx
from qkd.cli.options.values import output_file
from quantizers import QuantSpec, calibrate, prepare


def write_student(bits: int, path: Path, images: torch.Tensor) -> None:
    """Write a small untrained student with the same width in all layers."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    student = prepare(net, QuantSpec(weight_bits=bits, act_bits=bits, first_bits=None, last_bits=None), images[:2])
    calibrate(student, images)
    export_onnx(student.eval(), images[:1], path, pack="packed")


def rewritten(path: Path, folder: Path) -> dict[str, Path]:
    """Return the file that each tool writes."""
    found = {"export": path, "ORT format": path.with_suffix(".ort"), "onnxslim": folder / "slim.onnx"}
    convert = [sys.executable, "-m", "onnxruntime.tools.convert_onnx_models_to_ort", str(path)]
    subprocess.run([*convert, "--optimization_style", "Fixed"], check=True, capture_output=True)
    try:
        slim = [sys.executable, "-m", "onnxslim", str(path), str(found["onnxslim"])]
        subprocess.run(slim, check=True, capture_output=True)
    except subprocess.CalledProcessError:
        print("onnxslim is not installed; skipping it", file=sys.stderr)
        del found["onnxslim"]
    return found


def main() -> int:
    """Write students, let each tool rewrite them, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE")
    args = parser.parse_args()
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    rows: list[dict[str, Any]] = []
    for bits in (4, 2):
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "student.onnx"
            write_student(bits, path, images)
            wanted = None
            for tool, file in rewritten(path, Path(place)).items():
                logits = onnxruntime.InferenceSession(str(file)).run(None, {"images": images.numpy()})[0]
                wanted = logits if wanted is None else wanted
                rows.append({"student": f"w{bits}a{bits}", "tool": tool, "bytes": file.stat().st_size,
                             "max_difference": float(np.abs(logits - wanted).max())})  # fmt: skip
                print(rows[-1])
    if args.json is not None:
        content = {"onnxruntime": onnxruntime.__version__, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
