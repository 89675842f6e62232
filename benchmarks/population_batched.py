"""Measures whether a population trains faster in one batched pass than one by one, interleaved in one run.

    python benchmarks/population_batched.py --rounds 15 --json benchmarks/results/population_batched.json

A step is forward, backward and an SGD step of every member on its own batch. ``turns`` takes one member after another,
like the local engine; ``vmap`` stacks weights and batch-norm statistics and runs all members through
`torch.func.functional_call` under `torch.vmap`, with gradients from `torch.func.grad_and_value`. Before any timing,
both are compared: one step must give the same weights, up to rounding. The ratio is the median over the rounds of
(turns / vmap of the same round): above 1, the batched pass is worthwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state
from torch.nn import functional

from qkd.cli.options.values import output_file, positive
from qkd.nets import build_net

LEARNING_RATE = 0.05
TOLERANCE = 1e-4  # of weights after one step: sums are in another order
CASES = (("resnet8", 8, 1, 64), ("resnet8", 8, 1, 16), ("lenet5", 28, 1, 64), ("resnet20", 32, 3, 32))


class Turns:
    """One member after another."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members
        self.optimizers = [torch.optim.SGD(member.parameters(), lr=LEARNING_RATE) for member in members]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train each member on its batch: ``images[member]``."""
        for index, (member, optimizer) in enumerate(zip(self.members, self.optimizers, strict=True)):
            optimizer.zero_grad(set_to_none=True)
            functional.cross_entropy(member(images[index]), labels[index]).backward()
            optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        """Return all members' parameters, stacked."""
        states = [dict(member.named_parameters()) for member in self.members]
        return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


class Batched:
    """All members in one pass."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.parameters, self.buffers = stack_module_state(members)  # type: ignore[arg-type]
        skeleton = copy.deepcopy(members[0]).to("meta").train()

        def loss(parameters: Any, buffers: Any, images: Tensor, labels: Tensor) -> Tensor:
            return functional.cross_entropy(functional_call(skeleton, (parameters, buffers), (images,)), labels)

        self._gradients = torch.vmap(grad_and_value(loss), randomness="different")

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train each member on its batch: ``images[member]``; batch-norm statistics are updated in place."""
        gradients, _ = self._gradients(self.parameters, self.buffers, images, labels)
        with torch.no_grad():
            names = list(self.parameters)
            torch._foreach_add_(
                [self.parameters[name] for name in names], [gradients[name] for name in names], alpha=-LEARNING_RATE
            )

    def weights(self) -> dict[str, Tensor]:
        """Return all members' parameters, stacked."""
        return {name: tensor.detach() for name, tensor in self.parameters.items()}


def measure(
    net: str, size: int, channels: int, batch: int, *, members: int, rounds: int, device: str
) -> dict[str, Any]:
    """Return the times of both approaches on one net, in milliseconds per step of the whole population."""
    nets = []
    for member in range(members):
        torch.manual_seed(member)
        nets.append(build_net(net, classes=10, channels=channels, image_size=size).train().to(device))
    ways = {"turns": Turns([copy.deepcopy(one) for one in nets]), "vmap": Batched([copy.deepcopy(one) for one in nets])}
    torch.manual_seed(0)
    images = torch.randn(members, batch, channels, size, size).to(device)
    labels = torch.randint(10, (members, batch)).to(device)
    for way in ways.values():
        way.step(images, labels)
    stacked = [way.weights() for way in ways.values()]
    difference = max(float((stacked[0][name] - stacked[1][name]).abs().max()) for name in stacked[0])
    if difference > TOLERANCE:
        raise SystemExit(f"{net}: after one step, the weights of both approaches differ by {difference}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way.step(images, labels)
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - started))
    ratios = [one / other for one, other in zip(times["turns"], times["vmap"], strict=True)]
    return {
        "net": net, "image_size": size, "channels": channels, "batch_size": batch, "members": members,
        "largest_difference_after_a_step": difference,
        **{f"{name}_median_ms": statistics.median(values) for name, values in times.items()},
        "turns_over_vmap": statistics.median(ratios),
        "turns_over_vmap_p10": sorted(ratios)[len(ratios) // 10],
        "turns_over_vmap_p90": sorted(ratios)[-1 - len(ratios) // 10],
    }  # fmt: skip


def main() -> None:
    """Measure all cases; print them and write them to the ``--json`` file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=15)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=output_file(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in CASES:
        rows.append(measure(*case, members=args.members, rounds=args.rounds, device=args.device))
        row = rows[-1]
        print(
            f"{row['net']} {row['image_size']}x{row['image_size']}, batch {row['batch_size']}, {row['members']} "
            f"members: turns {row['turns_median_ms']:.1f} ms, vmap {row['vmap_median_ms']:.1f} ms, "
            f"turns/vmap {row['turns_over_vmap']:.2f}",
            flush=True,
        )
    result = {
        "command": f"python benchmarks/population_batched.py {' '.join(sys.argv[1:])}",
        "torch": torch.__version__, "threads": args.threads, "platform": platform.platform(), "cpu": cpu_name(),
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "load_average": os.getloadavg(), "cases": rows,
    }  # fmt: skip
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def cpu_name() -> str:
    """Return the processor's name if the system provides it."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
