"""Measures which runtime is fastest for a student on this processor, with the rows of each network interleaved.

    python benchmarks/runtimes.py --json benchmarks/results/runtimes.json
    python benchmarks/runtimes.py --nets resnet18:96 --bits 4

Rows: the float net, ONNX Runtime's static int8 and students of several widths in ONNX Runtime, and with the low-bit
provider if available; the float net, int8 and the students in OpenVINO if installed; with ``--compilers`` the students
in IREE and TVM, too. All of them run in this process, one after another. A student's file is written for each runtime
(`export.target`) and first compared with the student there. Nets are untrained: weights do not change a kernel's time.
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

from export import check_parity, export_float, export_int8_baseline, export_onnx
from export.devices.onboard.runner import machine
from export.lowbit import PROVIDER
from export.lowbit.sessions import low_bit_for, made_known
from export.runtime import open_session
from export.targets.sessions import open_in, unusable
from qkd.cli.options.values import output_file, positive
from quantizers import QuantSpec, Student, calibrate, prepare

RUNTIMES = ("openvino",)
COMPILERS = ("iree", "tvm")
TITLES = {"openvino": "OpenVINO", "iree": "IREE", "tvm": "TVM"}
NETS = ("lenet5:28", "resnet18:96", "mobilenet_v2:96")
CHANNELS = {"lenet5": 1}
WARMUP = 3


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
    """Write the files to measure, after comparing the logits of each in its runtime."""
    paths = {"fp32": folder / "fp32.onnx"}
    export_float(net, images[:1], paths["fp32"])
    paths["int8"] = export_int8_baseline(paths["fp32"], images.numpy(), folder / "int8.onnx")
    for code, student in students.items():
        for target in ("onnxruntime", *runtimes):
            name = code if target == "onnxruntime" else f"{code} for {target}"
            paths[name] = export_onnx(student, images[:1], folder / f"{code}-{target}.onnx", target=target).path
            runtime = None if target == "onnxruntime" else target
            check_parity(student, paths[name], [images], layer_images=0, runtime=runtime).raise_if_worse()
    return paths


def open_all(students: dict[str, Student], paths: dict[str, Path], images: Tensor, args: argparse.Namespace,
             runtimes: tuple[str, ...], folder: Path) -> dict[str, Any]:  # fmt: skip
    """Return a session for each row by name."""
    sessions: dict[str, Any] = {}
    for name, path in paths.items():
        target = name.partition(" for ")[2]
        if not target:
            sessions[name] = open_session(path, optimize=True, threads=args.threads)
            if args.low_bit and low_bit_for(path):
                sessions[f"{name}, low-bit provider"] = open_session(
                    path, optimize=True, threads=args.threads, provider=made_known(PROVIDER)
                )
        for runtime in runtimes:
            if target == runtime or name in ("fp32", "int8"):
                sessions[f"{name}, {TITLES[runtime]}"] = open_in(runtime, path.read_bytes(), args.threads)
    for code, student in students.items():
        for compiler in args.compilers:
            path = export_onnx(student, images[:1], folder / f"{code}-{compiler}.onnx", target=compiler).path
            check_parity(student, path, [images[:1]], layer_images=0, runtime=compiler).raise_if_worse()
            sessions[f"{code} for {compiler}, {TITLES[compiler]}"] = open_in(compiler, path.read_bytes(), args.threads)
    return sessions


def timed(sessions: dict[str, Any], images: Tensor, rounds: int, clock: str) -> list[dict[str, Any]]:
    """Return one row per session, all interleaved, each with ratios to the float net in ONNX Runtime."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    feeds, times = {"images": images[:1].numpy()}, {name: list[float]() for name in sessions}
    for turn in range(WARMUP + rounds):
        for name, session in sessions.items():
            start = now()
            session.run(["logits"], feeds)
            if turn >= WARMUP:
                times[name].append(1e3 * (now() - start))
    reference, least = statistics.median(times["fp32"]), min(times["fp32"])
    return [
        {
            "name": name,
            "median_ms": statistics.median(found),
            "p10_ms": float(np.percentile(found, 10)),
            "p90_ms": float(np.percentile(found, 90)),
            "to_fp32": statistics.median(found) / reference,
            "least_ms": min(found),
            "least_to_fp32": min(found) / least,
        }
        for name, found in times.items()
    ]


def measure(entry: str, args: argparse.Namespace, runtimes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of one net."""
    name, _, size = entry.partition(":")
    net = build(name, int(size))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, CHANNELS.get(name, 3), int(size), int(size), generator=generator)
    students = students_of(net, images, args.bits)
    with tempfile.TemporaryDirectory() as place:
        paths = write_files(net, students, images, runtimes, Path(place))
        sessions = open_all(students, paths, images, args, runtimes, Path(place))
        return timed(sessions, images, args.rounds, args.clock)


def main() -> int:
    """Write the files, measure them and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), help="name:image size; lenet5 or a torchvision net")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2], help="of weights and activations")
    parser.add_argument("--rounds", type=positive, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compilers", nargs="*", default=[], choices=COMPILERS, help="also measure these")
    parser.add_argument("--no-low-bit", dest="low_bit", action="store_false", help="omit the low-bit provider")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: this process's time, if other processes run"
    )
    parser.add_argument(
        "--json", type=output_file(".json"), metavar="FILE", help="write the rows, settings and machine, too"
    )
    args = parser.parse_args()
    missing = {name: why for name in RUNTIMES if (why := unusable(name))}
    runtimes = tuple(name for name in RUNTIMES if name not in missing)
    for name, why in missing.items():
        print(f"skipping {name}: {why}", file=sys.stderr)
    said = {key: getattr(args, key) for key in ("nets", "bits", "rounds", "threads", "compilers", "clock")}
    content: dict[str, Any] = {"settings": said, "machine": machine(), "load": {}, "nets": {}}
    for entry in args.nets:
        content["nets"][entry] = measure(entry, args, runtimes)
        content["load"][entry] = round(os.getloadavg()[0], 1)
        for row in content["nets"][entry]:
            shares = f"{row['to_fp32']:5.2f} of fp32 (of the least times: {row['least_to_fp32']:5.2f})"
            print(f"{entry:<16} {row['name']:<32} {row['median_ms']:8.3f} ms  {shares}", flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
