"""Measures a training step on a device: float and distillation steps; eager, compiled, captured; one seed and several.

    python benchmarks/gpu/measure.py --budget-s 120 --out results/

Cases run in order of interest until the budget is used up; the record is written after each. Images are made up. An
epoch is 50,000 images; with several lanes the rate includes the epochs of all of them.
"""

from __future__ import annotations

import argparse
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkd.config import TrainConfig
from qkd.nets import build_net
from quantizers import QuantSpec, calibrate, prepare
from quantizers.kernels import set_fused

from images import CropFlip, Images, made_up_images, normalizer  # isort: skip - next to this file
from ladder import WITH_TEACHER  # isort: skip
from lanes import How, Lane, Lanes, Terms  # isort: skip
from record import environment, write_record  # isort: skip

EPOCH_IMAGES = 50_000
PLAIN = How(bf16=False, compiled=False, graphs=False, channels_last=False)
EAGER_BF16 = How(compiled=False, graphs=False)
CAPTURED = How(compiled=False)


@dataclass(frozen=True)
class Case:
    """A measurement: bits (None for the float net without a teacher), batch, parallel seeds, machinery."""

    bits: int | None
    batch: int
    lanes: int
    how: How
    fused: bool = False

    @property
    def name(self) -> str:
        """Return a name for the table."""
        net = "float" if self.bits is None else f"w{self.bits}a{self.bits}+kd"
        fused = "+fused_kernels" if self.fused else ""
        return f"{net} batch {self.batch} x{self.lanes} {self.how.describe()}{fused}"


CASES = (
    Case(2, 256, 1, How()),
    Case(2, 256, 3, How()),
    Case(2, 256, 1, PLAIN),
    Case(None, 256, 1, PLAIN),
    Case(None, 256, 1, How()),
    Case(None, 256, 3, How()),
    Case(2, 256, 1, CAPTURED),
    Case(2, 256, 1, PLAIN, fused=True),
    Case(2, 256, 1, EAGER_BF16),
    Case(4, 256, 1, How()),
    Case(2, 128, 1, How()),
    Case(2, 128, 3, How()),
    Case(2, 512, 1, How()),
    Case(4, 256, 1, PLAIN),
)


def measure(case: Case, net: str, images: Images, least_s: float) -> dict[str, Any]:
    """Return the time of a step and the figures derived from it."""
    set_fused(enabled=case.fused)
    device, lanes = images.pixels.device, []
    data = CropFlip(images)
    for seed in range(case.lanes):
        torch.manual_seed(seed)
        size = images.pixels.shape[-1]
        teacher = build_net(net, classes=10, channels=3, image_size=size)
        student = teacher if case.bits is None else _student(teacher, case.bits, size)
        fixed = None if case.bits is None else teacher.to(device).eval().requires_grad_(False)
        lanes.append(Lane(student.to(device).train(), fixed, data, case.batch, seed, TrainConfig(epochs=1, lr=0.01)))
    terms = Terms() if case.bits is None else WITH_TEACHER
    together = Lanes(lanes, terms, normalizer(images), case.how)
    prepare_s = together.prepare()
    step_s = together.step_seconds(least_s=least_s)
    together.close()
    rate = case.batch * case.lanes / step_s
    return {
        "prepare_s": round(prepare_s, 2), "step_ms": round(1e3 * step_s, 4), "images_per_s": round(rate),
        "epochs_per_s": round(rate / EPOCH_IMAGES, 4),
    }  # fmt: skip


def _student(teacher: nn.Module, bits: int, size: int) -> nn.Module:
    images = torch.randn(64, 3, size, size)
    student = prepare(teacher.train(), QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=images[:2])
    calibrate(student, [images])
    return student


def main() -> None:
    """Parse the command line, measure case by case, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=120.0)
    parser.add_argument("--tiny", action="store_true", help="a small net and few images, to test the program")
    parser.add_argument("--eager", action="store_true", help="omit cases that compile whole steps")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device, end = torch.device(args.device), time.monotonic() + args.budget_s
    net, side = ("resnet8", 16) if args.tiny else ("resnet20", 32)
    torch.backends.cudnn.benchmark = True
    images = made_up_images(64 if args.tiny else 4096, side=side).to(device)
    rows: dict[str, Any] = {}
    record = {
        "what": "one training step; epochs of 50,000 images", "net": net, "environment": environment(device),
        "cases": rows,
    }  # fmt: skip
    for case in CASES:
        if args.eager and case.how.compiled:
            continue
        if time.monotonic() > end:
            rows[case.name] = "not measured: the time was up"
            continue
        shown = Case(case.bits, 16, case.lanes, case.how, case.fused) if args.tiny else case
        try:
            rows[case.name] = measure(shown, net, images, 0.0 if args.tiny else 1.0)
        except Exception as error:
            traceback.print_exc()
            rows[case.name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(f"{case.name}: {rows[case.name]}", flush=True)
        write_record(args.out / "gpu_steps.json", record)
    write_record(args.out / "gpu_steps.json", record)


if __name__ == "__main__":
    main()
