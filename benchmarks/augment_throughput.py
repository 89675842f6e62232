"""Measures augmentation: this toolkit's batched agents against torchvision v2 and Kornia, interleaved in one run.

    python benchmarks/augment_throughput.py --rounds 9 --json benchmarks/results/augment_throughput.json

One thread, color images cropped from two photographs. RandAugment is the same work for all (2 operations at magnitude
9, no crop or flip); torchvision samples per image, as in a data loader; Kornia samples one sequence for the whole
batch. ``pba`` is at most two operations from a policy of all fifteen; ``crop_flip`` adds crop and flip; ``batched`` is
the engine that works without a C++ compiler. Every round times every variant once, in turn; a ratio is the median over
the rounds of (theirs / ours of the same round). Ratios are of the process's CPU time, so that other work on the machine
matters less; wall times are given, too. ``--step`` measures the share of a ResNet-20 W2A2
distillation step (batch 128, 32x32) that augmentation takes. Kornia is installed in a separate folder:
``pip install --target DIR --no-deps kornia kornia_rs``, then ``--kornia DIR``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2

from qkd.agents.operations import native
from qkd.cli.options.values import output_file, positive
from quantizers.native.building import cpp_compiler

Action = Callable[[], object]
MEAN = (0.49, 0.48, 0.45)


def photographs(side: int, count: int) -> Tensor:
    """Return random crops of two photographs, uint8 ``[count, 3, side, side]``."""
    rng = np.random.default_rng(0)
    pieces = []
    for index in range(count):
        photo = load_sample_images().images[index % 2]
        top, left = rng.integers(photo.shape[0] - side), rng.integers(photo.shape[1] - side)
        pieces.append(photo[top : top + side, left : left + side])
    return torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).contiguous()


def ours(images: Tensor, policy: str, **settings: Any) -> Action:
    """Return a call of one of our agents, which samples again on every call."""
    from qkd.agents import build_agent
    from qkd.config import AgentConfig

    agent = build_agent(AgentConfig(policy=policy, **settings), epochs=3, mean=MEAN)
    generator = torch.Generator().manual_seed(0)
    return lambda: agent(images, generator=generator, epoch=2)


def without_compiler(action: Action) -> Action:
    """Return a call that uses the batched engine, as without a C++ compiler."""

    def call() -> object:
        compiled = native.load
        native.load = lambda: None
        try:
            return action()
        finally:
            native.load = compiled

    return call


def variants(images: Tensor, kornia_at: Path | None) -> dict[str, Action]:
    """Return the variants to compare: name -> a call that augments the batch once."""
    pillow = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    tensors = list(images.unbind(0))
    theirs = v2.RandAugment(num_ops=2, magnitude=9)
    bare = {"crop_padding": 0, "flip": False}
    made: dict[str, Action] = {
        "ours_randaugment": ours(images, "randaugment", **bare),
        "ours_randaugment_batched": without_compiler(ours(images, "randaugment", **bare)),
        "ours_pba": ours(images, "pba", **bare),
        "ours_pba_crop_flip": ours(images, "pba"),
        "torchvision_pil": lambda: [theirs(image) for image in pillow],
        "torchvision_tensor": lambda: [theirs(image) for image in tensors],
    }
    if kornia_at is not None:
        sys.path.append(str(kornia_at))
        from kornia.augmentation.auto import RandAugment

        kornia = RandAugment(n=2, m=9)
        made["kornia_batch"] = lambda: kornia(images.to(torch.float32).div_(255)).mul_(255).to(torch.uint8)
    return made


def interleaved(actions: dict[str, Action], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return (CPU, wall) milliseconds of every action in every round, after one warm-up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    for index in range(rounds + 1):
        for name, action in actions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            pair = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)
            if index:
                times[name].append(pair)
    return times


def summary(times: dict[str, list[tuple[float, float]]], images: int) -> dict[str, Any]:
    """Return medians with p10 and p90, and ratios to ours."""
    rows: dict[str, Any] = {}
    for name, pairs in times.items():
        cpu = sorted(pair[0] for pair in pairs)
        rows[name] = {
            "cpu_ms": round(statistics.median(cpu), 3),
            "cpu_p10_ms": round(cpu[len(cpu) // 10], 3),
            "cpu_p90_ms": round(cpu[-1 - len(cpu) // 10], 3),
            "wall_ms": round(statistics.median(pair[1] for pair in pairs), 3),
            "images_per_cpu_second": round(1e3 * images / statistics.median(cpu)),
        }
    ratios = {}
    for mine in (name for name in times if name.startswith("ours")):
        for other in (name for name in times if not name.startswith("ours")):
            values = [b[0] / a[0] for a, b in zip(times[mine], times[other], strict=True)]
            ratios[f"{other}/{mine}"] = round(statistics.median(values), 2)
    return {"variants": rows, "ratios": ratios}


def step_share(rounds: int) -> dict[str, Any]:
    """Return how long augmentation and the rest of a distillation step take (batch 128, 32x32, ResNet-20 W2A2)."""
    sys.path.append(str(Path(__file__).parent))
    from train_step import make_step

    images = photographs(32, 128)
    labels = torch.arange(128) % 10
    actions = {
        "step": make_step("ours_w2a2", "resnet20", images.to(torch.float32).div(255).sub(0.5), labels),
        "pba_crop_flip": ours(images, "pba"),
        "randaugment_crop_flip": ours(images, "randaugment"),
    }
    times = interleaved(actions, rounds)
    medians = {name: statistics.median(pair[0] for pair in pairs) for name, pairs in times.items()}
    shares = {name: round(value / (value + medians["step"]), 4) for name, value in medians.items() if name != "step"}
    return {"cpu_ms": {name: round(value, 2) for name, value in medians.items()}, "share_of_step": shares}


def versions() -> dict[str, str]:
    """Return versions and hardware of the measurement."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    kornia, compiler = sys.modules.get("kornia"), cpp_compiler()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    made_by = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else "none"
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": models[0] if models else platform.processor(),
        "isa": torch.backends.cpu.get_cpu_capability(),  # of PyTorch; ours: see `flags`
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "kornia": getattr(kornia, "__version__", "not measured"),
        "commit": commit.stdout.strip(),
        "compiler": made_by.partition("\n")[0],
        "flags": " ".join(native.FLAGS),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Augmentation throughput against torchvision v2 and Kornia.")
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--sizes", default="32:256,224:32", help="side:batch, ...")
    parser.add_argument("--kornia", type=Path, help="folder where Kornia is installed (pip install --target)")
    parser.add_argument("--step", action="store_true", help="measure the share of a distillation step, too")
    parser.add_argument("--march", default="native", help="target of our C++ compiler; x86-64-v3 is AVX2")
    parser.add_argument("--json", type=output_file(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    native.FLAGS = tuple(f"-march={args.march}" if flag == "-march=native" else flag for flag in native.FLAGS)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "rounds": args.rounds, "threads": 1}
    for entry in args.sizes.split(","):
        side, batch = map(int, entry.split(":"))
        images = photographs(side, batch)
        measured = summary(interleaved(variants(images, args.kornia), args.rounds), batch)
        result[f"{side}x{side}, batch {batch}"] = measured
        print(entry, json.dumps(measured["ratios"], indent=1))
    if args.step:
        result["distillation step"] = step_share(args.rounds)
        print(json.dumps(result["distillation step"], indent=1))
    result["versions"] = versions()
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
