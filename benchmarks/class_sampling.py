"""Measures soft targets over very many classes: time, memory and variance of the full and the sampled loss.

    python benchmarks/class_sampling.py

A step is forward and backward of the last linear layer and the loss, with the batch's features and the layer's rows as
leaves, and given log-probabilities of the teacher. Full and sampled steps run interleaved in one process for time, and
each in a separate process for memory (peak resident size during the step, minus that before it). The normalizers of the
sampled step come from a second draw, which is part of its time; the sampling probabilities are given. Variance is the
summed variance over draws of the gradient of the features, for proposals by difference, by the teacher and uniform;
bias is a z-test of its projection on the full gradient, with exact normalizers. Writes OUT.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stage_runs import environment
from torch import Tensor

from qkd.cli.options.values import output_file, positive
from qkd.losses import (
    SampledClasses,
    class_proposal,
    draw_classes,
    estimated_log_normalizers,
    sampled_soft_target_loss,
    soft_target_loss,
)

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("difference", "teacher", "uniform")
NOISE = 0.3  # of the student's rows and features relative to the teacher's


class Layer:
    """The last layer of a student, with a teacher's logits.

    Args:
        classes: Number of classes.
        batch: Number of images.
        features: Number of inputs of the layer.
    """

    def __init__(self, classes: int, batch: int, features: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        rows, feature = drawn(classes, features) * features**-0.5 * 4, drawn(batch, features)
        self.rows = (rows + NOISE * features**-0.5 * drawn(classes, features)).requires_grad_()
        self.feature = (feature + NOISE * drawn(batch, features)).requires_grad_()
        self.teacher = torch.empty(batch, classes)  # in place, so that creating it leaves little behind
        torch.matmul(feature, rows.T, out=self.teacher)

    def full(self) -> None:
        """Take the full step."""
        soft_target_loss(self.feature @ self.rows.T, self.teacher, temperature=1.0).backward()

    def sampled(self, proposal: Tensor, logs: Tensor, count: int, generator: torch.Generator) -> None:
        """Take the sampled step; the normalizers come from a second draw."""
        other, own = (draw_classes(proposal, count, generator) for _ in range(2))
        constants = estimated_log_normalizers(self.feature, self.rows, None, other)
        self._loss(own, logs, constants).backward()

    def _loss(self, drawn: SampledClasses, logs: Tensor, constants: Tensor) -> Tensor:
        return sampled_soft_target_loss(
            self.feature, self.rows, None, logs[:, drawn.classes], drawn, constants
        )  # fmt: skip

    def forget(self) -> None:
        """Drop the gradients."""
        self.rows.grad = self.feature.grad = None

    def proposal(self, kind: str) -> Tensor:
        """Return a proposal, computed from the current nets."""
        with torch.no_grad():
            return class_proposal(
                torch.softmax(self.feature @ self.rows.T, 1), torch.softmax(self.teacher, 1), kind=kind
            )

    def gradient(self, drawn: SampledClasses, logs: Tensor, constants: Tensor) -> Tensor:
        """Return the gradient of the features from a draw."""
        return torch.autograd.grad(self._loss(drawn, logs, constants), self.feature)[0]


def clock(step: Callable[[], None], layer: Layer) -> float:
    """Return the time of a step in milliseconds."""
    layer.forget()
    start = time.perf_counter()
    step()
    return 1000 * (time.perf_counter() - start)


def times(args: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Return median, p10 and p90 of both steps, interleaved."""
    layer, generator = Layer(classes, args.batch, args.features), torch.Generator().manual_seed(1)
    proposal, logs = layer.proposal("difference"), torch.log_softmax(layer.teacher, 1)
    steps = {"full": layer.full, "sampled": lambda: layer.sampled(proposal, logs, args.drawn, generator)}
    for step in steps.values():
        clock(step, layer)
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            found[name].append(clock(step, layer))
    rows = {name: _quantiles(values) for name, values in found.items()}
    return {**rows, "time_ratio": rows["sampled"]["median_ms"] / rows["full"]["median_ms"]}


def _quantiles(values: list[float]) -> dict[str, float]:
    tenths = statistics.quantiles(values, n=10)
    return {"median_ms": statistics.median(values), "p10_ms": tenths[0], "p90_ms": tenths[-1], "rounds": len(values)}


def variances(args: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Return the variance of the features' gradient for each proposal, and a z-test of its bias."""
    layer = Layer(classes, args.batch, args.features)
    logs = torch.log_softmax(layer.teacher, 1)
    with torch.no_grad():
        constants = torch.logsumexp(layer.feature @ layer.rows.T, 1)
    layer.forget()
    layer.full()
    exact = layer.feature.grad
    found = {}
    for kind in KINDS:
        proposal, generator = layer.proposal(kind), torch.Generator().manual_seed(2)
        made = torch.stack([
            layer.gradient(draw_classes(proposal, args.drawn, generator), logs, constants) for _ in range(args.draws)
        ])  # fmt: skip
        along = (made.double() * exact.double()).sum((1, 2)) / exact.double().square().sum()  # 1 on average
        z = (along.mean() - 1) / (along.std() / args.draws**0.5)
        found[kind] = {"variance": float(made.var(0).sum()), "mean_projection": float(along.mean()), "z": float(z)}
    return {
        "proposals": found,
        "difference_over_uniform": found["difference"]["variance"] / found["uniform"]["variance"],
    }


def memory_mib(name: str, args: argparse.Namespace, classes: int) -> float:
    """Return the increase in this process's peak resident size during a step, in MiB."""
    layer = Layer(classes, args.batch, args.features)
    generator = torch.Generator().manual_seed(1)
    if name == "sampled":
        proposal = torch.full((classes,), 1 / classes)
        layer.teacher -= torch.logsumexp(layer.teacher, 1, keepdim=True)
    step = layer.full if name == "full" else lambda: layer.sampled(proposal, layer.teacher, args.drawn, generator)
    before, peak, is_over = resident_mib(), [0.0], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            peak[0] = max(peak[0], resident_mib())
            time.sleep(2e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    is_over.set()
    watcher.join()
    return max(peak[0], resident_mib()) - before


def resident_mib() -> float:
    """Return the current resident size of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def memories(args: argparse.Namespace, classes: int) -> dict[str, Any]:
    """Return the memory of both steps, each measured in a separate process."""
    found = {}
    for name in ("full", "sampled"):
        command = [sys.executable, __file__, "--only", name, "--classes", str(classes), "--batch", str(args.batch)]
        command += ["--features", str(args.features), "--drawn", str(args.drawn)]
        found[name] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        **{f"{name}_mib": value for name, value in found.items()},
        "memory_ratio": found["sampled"] / found["full"] if found["full"] else None,
    }


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", nargs="+", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--drawn", type=int, default=1024)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--only", choices=("full", "sampled"), help="measure and print the memory of one step")
    parser.add_argument(
        "--out", type=output_file(".json"), default=ROOT / "benchmarks" / "results" / "class_sampling.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        print(memory_mib(args.only, args, args.classes[0]))
        return
    rows = []
    for classes in args.classes:
        row = {"classes": classes, "drawn": args.drawn}
        rows.append({**row, **times(args, classes), **memories(args, classes), **variances(args, classes)})
        print(json.dumps(rows[-1]))
    facts = {"batch": args.batch, "features": args.features, "draws": args.draws, "threads": 1}
    facts["environment"] = environment()
    args.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
