"""Measures which runtime is fastest for a student on this processor: a table, the rows of each network interleaved.

    python benchmarks/runtimes.py --json benchmarks/results/runtimes.json
    python benchmarks/runtimes.py --nets resnet18:96 --bits 4

Rows: the float net, ONNX Runtime's static int8 and students of several widths in ONNX Runtime, and under the low-bit
provider where it is offered; the float net and the students in OpenVINO where that is installed. With ``--compilers``
students in IREE and TVM, too, timed in this process against the float net in ONNX Runtime. A student's file is written
for each runtime (`export.target`) and compared with the student there first. Nets are untrained: weights do not change
what a kernel takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export import Device, LatencyReport, Settings, check_parity, export_float, export_int8_baseline, export_onnx
from export.devices.measuring import measure_on
from export.runtime import open_session
from export.targets.sessions import is_installed, open_in
from quantizers import QuantSpec, Student, calibrate, prepare

RUNTIMES = ("openvino",)
COMPILERS = ("iree", "tvm")
NETS = ("lenet5:28", "resnet18:96", "mobilenet_v2:96")
CHANNELS = {"lenet5": 1}
PROVIDERS = ("cpu", "lowbit")
MAXIMUM_SECONDS = 20.0  # of one compiled net's rounds


def build(name: str, image_size: int) -> nn.Module:
    """Return an untrained net with running statistics, in evaluation mode."""
    from qkd.nets import build_net

    torch.manual_seed(0)
    channels = CHANNELS.get(name, 3)
    own = name in CHANNELS
    net = build_net(
        name if own else f"torchvision/{name}", classes=10 if own else 1000, channels=channels, image_size=image_size
    ).train()
    with torch.no_grad():
        net(torch.randn(4, channels, image_size, image_size))
    return net.eval()


def students_of(net: nn.Module, images: Tensor, bits: list[int]) -> dict[str, Student]:
    """Return a calibrated student for each width, first and last layer 8 bits wide."""
    found = {}
    for width in bits:
        student = prepare(net, QuantSpec(weight_bits=width, act_bits=width), images[:2])
        calibrate(student, images)
        found[f"w{width}a{width}"] = student.eval()
    return found


def write_files(
    net: nn.Module, students: dict[str, Student], images: Tensor, runtimes: tuple[str, ...], folder: Path
) -> dict[str, Path]:
    """Write the files that are measured, each proven in its runtime."""
    paths = {"fp32": folder / "fp32.onnx"}
    export_float(net, images[:1], paths["fp32"])
    paths["int8"] = export_int8_baseline(paths["fp32"], images.numpy(), folder / "int8.onnx")
    for code, student in students.items():
        for target in ("onnxruntime", *runtimes):
            name = code if target == "onnxruntime" else f"{code} for {target}"
            paths[name] = export_onnx(student, images[:1], folder / f"{code}-{target}.onnx", target=target).path
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


def compiled_rows(
    students: dict[str, Student], fp32: Path, images: Tensor, compilers: list[str], rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Return a row for each student in each compiler; the float net takes its turn in every round."""
    feeds = {"images": images[:1].numpy()}
    sessions: dict[str, Any] = {"fp32": open_session(fp32, optimize=True, threads=1)}
    for code, student in students.items():
        for compiler in compilers:
            path = export_onnx(student, images[:1], folder / f"{code}-{compiler}.onnx", target=compiler).path
            check_parity(student, path, [images[:1]], layer_images=0, runtime=compiler).raise_if_worse()
            sessions[f"{code} for {compiler}, {compiler}"] = open_in(compiler, path.read_bytes())
    times: dict[str, list[float]] = {name: [] for name in sessions}
    end = time.perf_counter() + MAXIMUM_SECONDS
    for turn in range(rounds + 1):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(["logits"], feeds)
            times[name].append(1e3 * (time.perf_counter() - start))
        if turn and time.perf_counter() > end:
            break
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # without the first, which warms up
    return [
        {
            "name": name,
            "median_ms": median,
            "p10_ms": float(np.percentile(times[name][1:], 10)),
            "p90_ms": float(np.percentile(times[name][1:], 90)),
            "to_fp32": median / medians["fp32"],
            "notes": [f"{len(times[name]) - 1} rounds"],
        }
        for name, median in medians.items()
        if name != "fp32"
    ]


def measure(entry: str, args: argparse.Namespace, runtimes: tuple[str, ...]) -> tuple[list[dict[str, Any]], Any]:
    """Return the rows of one net, and the machine."""
    name, _, size = entry.partition(":")
    net = build(name, int(size))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, CHANNELS.get(name, 3), int(size), int(size), generator=generator)
    students = students_of(net, images, args.bits)
    with tempfile.TemporaryDirectory() as place:
        paths = write_files(net, students, images, runtimes, Path(place))
        settings = Settings(
            threads=args.threads, rounds=args.rounds, memory=False, providers=(*PROVIDERS[: args.providers], *runtimes)
        )
        reports = measure_on(Device("local", "local"), paths, settings)
        rows = rows_of(reports)
        if args.compilers:
            rows += compiled_rows(students, paths["fp32"], images, args.compilers, args.rounds, Path(place))
    return rows, dict(next(iter(reports.values())).machine)


def main() -> int:
    """Write the files, measure them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nets", nargs="+", default=list(NETS), help="name:image size; lenet5 or a net of torchvision's"
    )
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2], help="of weights and activations")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compilers", nargs="*", default=[], choices=COMPILERS, help="measured as well")
    parser.add_argument("--no-low-bit", dest="providers", action="store_const", const=1, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, settings and machine, too")
    args = parser.parse_args()
    runtimes = tuple(name for name in RUNTIMES if is_installed(name))
    for name in set(RUNTIMES) - set(runtimes):
        print(f"{name} is not installed, so it is left out", file=sys.stderr)
    nets, machine = {}, None
    for entry in args.nets:
        nets[entry], machine = measure(entry, args, runtimes)
        for row in nets[entry]:
            notes = "; ".join(row["notes"])
            print(f"{entry:<16} {row['name']:<32} {row['median_ms']:8.3f} ms  {row['to_fp32']:5.2f} of fp32  {notes}")
    if args.json is not None:
        said = {key: getattr(args, key) for key in ("nets", "bits", "rounds", "threads", "compilers")}
        content = {"settings": said, "machine": machine, "load_after": os.getloadavg()[0], "nets": nets}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
