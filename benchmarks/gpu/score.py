"""Scores the nets of a ladder on its test set once and verifies their files; both are added to the ladder's record.

    python benchmarks/gpu/score.py --set cifar10 --data FOLDER --record results/gpu_ladder_cifar10.json \
        --weights results/gpu_ladder_cifar10.safetensors [--large results/gpu_ladder_cifar10_large.safetensors] \
        [--export FOLDER]

Nets whose score is in the record are not scored again. With --export, the first seed's students are exported to ONNX
files, which are compared with them on every test image.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from export import check_parity, export_onnx

from images import Images, normalizer, read_images  # isort: skip - next to this file
from ladder import SETS, Setting, read_net, score, states_of  # isort: skip
from record import environment, write_record  # isort: skip


def prove(student: nn.Module, path: Path, setting: Setting, test: Images) -> dict[str, Any]:
    """Export a student to an ONNX file, compare both on every test image, and return the result."""
    factor, shift = normalizer(setting.train)
    images = test.pixels.float() * factor - shift
    path.parent.mkdir(parents=True, exist_ok=True)
    export_onnx(student, images[:1], path)
    report = check_parity(student, path, zip(images.split(250), test.labels.split(250), strict=True))
    return {
        "passed": report.passed, "faults": list(report.faults), "images": report.images,
        "another_class": report.off.differing, "another_class_optimized": report.on.differing,
        "bytes": path.stat().st_size, "onnxruntime": report.runtime_version,
    }  # fmt: skip


def main() -> None:
    """Parse the command line, score every net that has not been scored."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default="cifar10")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--large", type=Path, help="weights of the large teacher")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="export the first seed's students here and verify them"
    )
    args = parser.parse_args()
    record: dict[str, Any] = json.loads(args.record.read_text())
    train, test = read_images(args.data, "train"), read_images(args.data, "test")
    setting = Setting("resnet20", SETS[args.set], train, test, 256, (), Path(), time.monotonic(), 1, ())
    tensors = load_file(args.weights)
    seeds = sorted({int(key.split(".")[1]) for key in tensors})
    for rung in SETS[args.set].rungs:
        row = next((row for row in record["rungs"] if row["rung"]["name"] == rung.name), None)
        wants_file = args.export is not None and rung.bits is not None and row is not None and "file" not in row
        if row is None or (row.get("test_accuracy") is not None and not wants_file):
            continue
        states = states_of(tensors, rung.name, seeds)
        if rung.net is not None:
            states = [load_file(args.large)] if args.large else []
        nets = [read_net(rung, rung.net or "resnet20", state, train.pixels) for state in states if state]
        if row.get("test_accuracy") is None:
            row["test_accuracy"] = [score(net, setting, test) for net in nets] or None
        if rung.bits is not None:
            row["largest_step_size"] = [
                max(float(value.abs().max()) for key, value in state.items() if key.endswith("tensor_quant.scale"))
                for state in states
            ]
        if wants_file:
            row["file"] = prove(nets[0], args.export / f"{args.set}-{rung.name}.onnx", setting, test)
            print(f"{rung.name}: {row['file']}", flush=True)
        print(f"{rung.name}: {row['test_accuracy']}", flush=True)
        record["scored"] = environment(torch.device("cpu"))
        write_record(args.record, record)


if __name__ == "__main__":
    main()
