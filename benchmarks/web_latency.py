"""Measures students in WebAssembly (onnxruntime-web in Node, one thread), interleaved with FP32 and static int8.

    npm install --prefix ~/web onnxruntime-web@1.30
    python benchmarks/web_latency.py --packages ~/web --json benchmarks/results/web_latency.json

Nets are untrained: weights do not change a kernel's time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from runtimes import CHANNELS, build, students_of

from export import export_float, export_int8_baseline, export_onnx
from qkd.cli.options.values import output_file, positive

PROGRAM = Path(__file__).with_suffix(".js")


def write_files(entry: str, bits: list[int], folder: Path) -> tuple[int, int]:
    """Write a net's files; return the channels and the size of its images."""
    name, _, size = entry.partition(":")
    channels = CHANNELS.get(name, 3)
    net = build(name, int(size))
    images = torch.randn(4, channels, int(size), int(size), generator=torch.Generator().manual_seed(1))
    export_float(net, images[:1], folder / "fp32.onnx")
    export_int8_baseline(folder / "fp32.onnx", images.numpy(), folder / "int8.onnx")
    for code, student in students_of(net, images, bits).items():
        export_onnx(student, images[:1], folder / f"{code}.onnx", target="onnxruntime-web")
    return channels, int(size)


def rows_of(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return one row per file, each with the ratio of its median to the float net's."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    return [
        {"name": name, "median_ms": median, "to_fp32": median / medians["fp32"]} for name, median in medians.items()
    ]


def main() -> int:
    """Write the files, time them in Node and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with node_modules/onnxruntime-web")
    parser.add_argument("--nets", nargs="+", default=["resnet18:96", "mobilenet_v2:96"])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2])
    parser.add_argument("--rounds", type=positive, default=40)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's time, if other processes run"
    )
    parser.add_argument("--json", type=output_file(".json"), metavar="FILE")
    args = parser.parse_args()
    content: dict[str, Any] = {
        "settings": {key: getattr(args, key) for key in ("rounds", "nets", "bits", "clock")},
        "nets": {},
    }
    for entry in args.nets:
        with tempfile.TemporaryDirectory() as place:
            shape = write_files(entry, args.bits, Path(place))
            command = [
                "node",
                str(PROGRAM),
                str(args.packages.resolve()),
                place,
                str(args.rounds),
                *map(str, shape),
                args.clock,
            ]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        content["version"], content["nets"][entry] = found["version"], rows_of(found["times"])
        content["load"] = round(os.getloadavg()[0], 1)
        for row in content["nets"][entry]:
            print(f"{entry:<18} {row['name']:<6} {row['median_ms']:8.2f} ms  {row['to_fp32']:5.2f} of fp32")
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
