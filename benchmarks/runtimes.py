"""Measures which runtime is fastest for a student on this processor: a table, all rows interleaved.

    python benchmarks/runtimes.py --net resnet18 --image-size 96 --bits 4 --json benchmarks/results/runtimes.json

Rows: the float net, ONNX Runtime's static int8 and the student in ONNX Runtime (and under the low-bit provider where it
is offered); the float net and the student in OpenVINO where that is installed. The student's file is written for each
runtime (`export.target`) and compared with the student there first. Nets are untrained: weights do not change what a
kernel takes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export import Device, LatencyReport, Settings, check_parity, export_float, export_int8_baseline, export_onnx
from export.devices.measuring import measure_on
from export.targets.sessions import is_installed
from quantizers import QuantSpec, calibrate, prepare

RUNTIMES = ("openvino",)


def build(name: str, image_size: int) -> nn.Module:
    """Return an untrained net with running statistics, in evaluation mode."""
    from qkd.nets import build_net

    torch.manual_seed(0)
    net = build_net(f"torchvision/{name}", classes=1000, channels=3, image_size=image_size).train()
    with torch.no_grad():
        net(torch.randn(4, 3, image_size, image_size))
    return net.eval()


def write_files(net: nn.Module, images: Tensor, bits: int, runtimes: tuple[str, ...], folder: Path) -> dict[str, Path]:
    """Write the files that are measured, each proven in its runtime."""
    paths = {"fp32": folder / "fp32.onnx"}
    export_float(net, images[:1], paths["fp32"])
    paths["int8"] = export_int8_baseline(paths["fp32"], images.numpy(), folder / "int8.onnx")
    student = prepare(net, QuantSpec(weight_bits=bits, act_bits=bits), images[:2])
    calibrate(student, images)
    student.eval()
    for target in ("onnxruntime", *runtimes):
        name = f"w{bits}a{bits}" if target == "onnxruntime" else f"w{bits}a{bits} for {target}"
        paths[name] = export_onnx(student, images[:1], folder / f"{target}.onnx", target=target).path
        runtime = None if target == "onnxruntime" else target
        check_parity(student, paths[name], [images], layer_images=1, runtime=runtime).raise_if_worse()
    return paths


def rows_of(reports: dict[str, LatencyReport]) -> list[dict[str, Any]]:
    """Return a row a measurement, the ratio to the float net in ONNX Runtime in each."""
    reference = reports["fp32"].median_ms
    return [
        {
            "name": name,
            "median_ms": report.median_ms,
            "p10_ms": report.p10_ms,
            "p90_ms": report.p90_ms,
            "to_fp32": report.median_ms / reference,
            "notes": list(report.notes),
        }
        for name, report in reports.items()
    ]


def main() -> int:
    """Write the files, measure them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18", help="a net of torchvision's")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations, first and last layer 8")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, settings and machine, too")
    args = parser.parse_args()
    runtimes = tuple(name for name in RUNTIMES if is_installed(name))
    for name in set(RUNTIMES) - set(runtimes):
        print(f"{name} is not installed, so it is left out", file=sys.stderr)
    net = build(args.net, args.image_size)
    images = torch.randn(4, 3, args.image_size, args.image_size, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as place:
        paths = write_files(net, images, args.bits, runtimes, Path(place))
        settings = Settings(threads=args.threads, rounds=args.rounds, memory=False, providers=("cpu", *runtimes))
        reports = measure_on(Device("local", "local"), paths, settings)
    rows = rows_of(reports)
    for row in rows:
        print(f"{row['name']:<32} {row['median_ms']:8.3f} ms  {row['to_fp32']:5.2f} of fp32  {'; '.join(row['notes'])}")
    if args.json is not None:
        machine = next(iter(reports.values())).machine
        settings_said = {key: value for key, value in vars(args).items() if key != "json"}
        content = {"settings": settings_said, "machine": dict(machine), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
