"""Measures one distillation step: float, this toolkit's W4A4 and W2A2, and stock Brevitas, interleaved in one run.

    python benchmarks/train_step.py --rounds 15 --json benchmarks/results/train_step.json

A step is: the teacher's forward pass without gradient, the student's forward and backward pass with cross-entropy plus
soft targets, and an SGD step. ResNet-20, 32x32, batch 128 unless said. Every round times every variant once, in turn;
the ratio is the median over the rounds of (variant / float of the same round). Peak memory is read in a separate
process per variant (``--memory``), as the growth of the resident set over the step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def stock_brevitas(model: nn.Module, bits: int) -> nn.Module:
    """Swap layers for Brevitas' own, with its default quantizers; first and last layer 8 bit."""
    import brevitas.nn as qnn
    from brevitas.quant import Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        width = 8 if name in (layers[0], layers[-1]) else bits
        new: nn.Module | None = None
        if isinstance(module, nn.Conv2d):
            new = qnn.QuantConv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation, module.groups, bias=module.bias is not None,
                weight_quant=Int8WeightPerChannelFloat, weight_bit_width=width,
            )  # fmt: skip
        elif isinstance(module, nn.Linear):
            new = qnn.QuantLinear(
                module.in_features, module.out_features, bias=True, weight_quant=Int8WeightPerChannelFloat,
                weight_bit_width=width,
            )  # fmt: skip
        elif isinstance(module, (nn.ReLU, nn.ReLU6)):
            new = qnn.QuantReLU(act_quant=Uint8ActPerTensorFloat, bit_width=bits)
        if new is not None:
            setattr(parent, name.rpartition(".")[2], new)
    return model


def build(variant: str, net: str, images: Tensor) -> nn.Module:
    """Return the student of a variant: ``float``, ``ours_w4a4``, ``stock_w2a2``, ``ours_w2a2_compiled``, ..."""
    from qkd.nets import build_net
    from quantizers import QuantSpec, calibrate, prepare

    torch.manual_seed(0)
    model = build_net(net, classes=10, channels=images.size(1), image_size=images.size(2)).train()
    if variant == "float":
        return model
    family, code, *rest = variant.split("_")
    bits = int(code[1])
    if family == "stock":
        return stock_brevitas(model, bits).train()
    student = prepare(model, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=images[:2])
    calibrate(student, [images])
    student.train()
    return torch.compile(student) if rest == ["compiled"] else student  # type: ignore[return-value]


def make_step(variant: str, net: str, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that does one distillation step of a variant."""
    teacher = build("float", net, images).eval()
    student = build(variant, net, images)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True)

    def step() -> None:
        with torch.no_grad():
            target = F.softmax(teacher(images) / 4, dim=1)
        logits = student(images)
        loss = F.cross_entropy(logits, labels) + F.kl_div(F.log_softmax(logits / 4, 1), target, reduction="batchmean")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _data(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, args.size, args.size, generator=generator)
    return images, torch.randint(0, 10, (args.batch,), generator=generator)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time all variants in turn and return medians and ratios."""
    images, labels = _data(args)
    steps = {variant: make_step(variant, args.net, images, labels) for variant in args.variants}
    for step in steps.values():
        for _ in range(args.warmup):
            step()
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for done in range(args.rounds):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            times[variant].append((time.perf_counter() - start) * 1e3)
        print(f"\rround {done + 1}/{args.rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return {variant: _summary(values, times["float"]) for variant, values in times.items()}


def _summary(values: list[float], base: list[float]) -> dict[str, float]:
    ratios = sorted(v / b for v, b in zip(values, base, strict=True))
    return {
        "median_ms": round(statistics.median(values), 2),
        "ratio_to_float": round(statistics.median(ratios), 3),
        "ratio_p10": round(ratios[len(ratios) // 10], 3),
        "ratio_p90": round(ratios[-1 - len(ratios) // 10], 3),
    }


def peak_memory_mb(args: argparse.Namespace) -> float:
    """Return the growth of this process's peak resident set over three steps, in MB."""
    images, labels = _data(args)
    step = make_step(args.memory, args.net, images, labels)
    if args.memory != "float":  # compile the kernels before the reading: the compiler's memory is not the step's
        small = make_step(args.memory, args.net, images[:4], labels[:4])
        small()
        del small
    before = _resident_mb()
    peak = 0.0
    handle = _PeakWatcher()
    with handle:
        for _ in range(3):
            step()
    peak = handle.peak_mb
    return peak - before


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class _PeakWatcher:
    """Samples the resident set from a thread; the growth of ru_maxrss would hide behind the set-up's own peak."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._stop = False

    def __enter__(self) -> _PeakWatcher:
        import threading

        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop:
            self.peak_mb = max(self.peak_mb, _resident_mb())
            time.sleep(0.002)

    def __exit__(self, *exc: object) -> None:
        self._stop = True
        self._thread.join()


def environment() -> dict[str, Any]:
    """Return versions and hardware."""
    import brevitas

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "python": platform.python_version(), "torch": torch.__version__, "brevitas": brevitas.__version__,
        "cpu": cpu, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> None:
    """Parse the command line, measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=32, help="image side in pixels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    default = ["float", "ours_w4a4", "ours_w2a2", "stock_w4a4", "stock_w2a2"]
    parser.add_argument("--variants", nargs="+", default=default, help="also ours_w2a2_compiled")
    parser.add_argument("--memory", help="print the peak memory of one variant and exit")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory readings")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_memory_mb(args))
        return
    results = measure(args)
    for variant, row in results.items():
        print(f"{variant:22s}", row, flush=True)
    for variant in [] if args.no_memory else args.variants:
        command = [sys.executable, __file__, "--memory", variant, "--net", args.net, "--batch", str(args.batch)]
        out = subprocess.run([*command, "--size", str(args.size)], capture_output=True, text=True, check=True)
        results[variant]["peak_memory_mb"] = round(float(out.stdout.split()[-1]), 1)
    for variant, row in ({} if args.no_memory else results).items():
        row["memory_ratio"] = round(row["peak_memory_mb"] / results["float"]["peak_memory_mb"], 3)
        print(f"{variant:22s}", row)
    if args.json:
        record = {
            "what": "one distillation step",
            "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("json", "memory")},
        }
        args.json.write_text(json.dumps({**record, "environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
