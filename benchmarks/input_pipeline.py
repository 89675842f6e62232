"""Measures the input pipeline at 224x224 against torchvision's ImageFolder, DataLoader and v2 transforms.

    python benchmarks/input_pipeline.py --rounds 4 --images 384 --json benchmarks/results/input_pipeline.json

A folder of JPEG files like ImageNet's (500x375 images at qualities 92 and 96, cropped from two photographs) is created
in a temporary folder and read from the page cache. Every round reads the whole folder once with every variant, in turn,
as in training: decoded, resized, augmented, normalized, in batches of float32 planes. ``resize_crop`` resizes the
shorter side to 256 and crops the center, ``random_crop`` is a random resized crop; both flip, optionally with
RandAugment (two operations at magnitude 9) or TrivialAugment. The number of workers is equal: torchvision's do all the
work; ours decode and resize, and the main process augments and normalizes. A ratio is the median over the rounds of
(theirs / ours of the same round), of wall time and of the CPU time of all processes. One thread per process.
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
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, features
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from qkd.agents import build_agent
from qkd.cli.options.values import output_file, positive
from qkd.config import AgentConfig
from qkd.data import epoch_order, iterate, normalize
from qkd.data.sets import Fit, FolderSplit, jpeg
from qkd.data.sets.images import decode_into
from qkd.data.sets.random_crop import RandomCrop, TrainingFolder
from qkd.data.sets.resampling import FLAGS
from qkd.training.source import PieceNumbers
from quantizers.native.building import cpp_compiler

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POLICIES = {"flip": "crop_flip", "randaugment": "randaugment", "trivial": "trivial"}
SIZE = 224


def make_folder(folder: Path, count: int) -> None:
    """Write ``count`` pictures of 500x375, two classes."""
    rng, photos = np.random.default_rng(0), load_sample_images().images
    for index in range(count):
        photo = Image.fromarray(photos[index % 2])
        share = rng.uniform(0.6, 1)
        width, height = int(photo.width * share), int(photo.width * share * 0.65)
        left, top = rng.integers(photo.width - width + 1), rng.integers(max(1, photo.height - height + 1))
        piece = photo.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.LANCZOS)
        path = folder / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        piece.save(path, quality=92 if index % 3 else 96)


def theirs(folder: Path, crop: str, policy: str, batch: int, workers: int) -> Callable[[], int]:
    """Return a pass over the folder with torchvision that returns the number of images."""
    if crop == "random_crop":
        steps: list[Any] = [v2.RandomResizedCrop(SIZE, antialias=True)]
    else:
        steps = [v2.Resize(256, antialias=True), v2.CenterCrop(SIZE)]
    steps.append(v2.RandomHorizontalFlip())
    steps += {"flip": [], "randaugment": [v2.RandAugment(2, 9)], "trivial": [v2.TrivialAugmentWide()]}[policy]
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    images = ImageFolder(str(folder), v2.Compose(steps))

    def run() -> int:
        loader = DataLoader(images, batch, shuffle=True, num_workers=workers, drop_last=False)
        return sum(len(shown) for shown, _ in loader)

    return run


def ours(folder: Path, crop: str, policy: str, batch: int, workers: int) -> Callable[[], int]:
    """Return a pass over the folder with this toolkit, as in a training source."""
    files = sorted(folder.glob("*/*.jpg"))
    labels = torch.tensor([path.parent.name == "b" for path in files], dtype=torch.int64)
    split = FolderSplit(files, labels, channels=3, image_size=SIZE, fit=Fit("crop", 256))
    agent = build_agent(AgentConfig(policy=POLICIES[policy], crop_padding=0), epochs=9, mean=MEAN)
    generator = torch.Generator()

    def run() -> int:
        order, count = epoch_order(len(split), generator.manual_seed(1)), 0
        read = split if crop == "resize_crop" else TrainingFolder(split, RandomCrop(), PieceNumbers(7))
        batches = iterate(read, order, batch, "cpu", drop_last=False, workers=workers)
        for start, (images, _) in zip(range(0, len(order), batch), batches, strict=True):
            places = order[start : start + batch]
            shown = agent(images, generator=generator.manual_seed(2), epoch=3, samples=places)
            count += len(normalize(shown, MEAN, STD))
        return count

    return run


def reduced_decoding(folder: Path, rounds: int) -> dict[str, Any]:
    """Return what decoding at a reduced scale saves and changes for photographs of several sizes."""
    found: dict[str, Any] = {}
    for width, height in ((500, 375), (1000, 750), (2000, 1500), (4000, 3000)):
        files = [folder / f"{width}_{index}.jpg" for index in range(2)]
        for file, photo in zip(files, load_sample_images().images, strict=True):
            Image.fromarray(photo).resize((width, height), Image.Resampling.LANCZOS).save(file, quality=92)
        times: dict[bool, list[float]] = {False: [], True: []}
        made = {is_reduced: torch.empty((2, 3, SIZE, SIZE), dtype=torch.uint8) for is_reduced in times}
        for index in range(rounds + 1):
            for is_reduced, seconds in times.items():
                start = time.process_time()
                for row, file in enumerate(files):
                    decode_into(made[is_reduced][row], file, Fit("crop", 256), is_reduced=is_reduced)
                seconds += [time.process_time() - start] if index else []
        full, reduced = (1e3 * statistics.median(times[is_reduced]) / len(files) for is_reduced in (False, True))
        difference = (made[False].int() - made[True].int()).abs().float().mean().item()
        found[f"{width}x{height}"] = {
            "full_ms": round(full, 2), "reduced_ms": round(reduced, 2), "mean_difference": round(difference, 2)
        }  # fmt: skip
    return found


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def measured(actions: dict[str, Callable[[], int]], rounds: int) -> dict[str, Any]:
    """Return throughput of each (ours, theirs), and the ratio of torchvision's time to ours."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in actions}
    images = 0
    for index in range(rounds + 1):
        for name, action in actions.items():
            wall, cpu = time.perf_counter(), cpu_seconds()
            images = action()
            if index:
                times[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
    rows = {
        name: {
            "images_per_second": round(images / statistics.median(pair[0] for pair in pairs), 1),
            "cpu_ms_per_image": round(1e3 * statistics.median(pair[1] for pair in pairs) / images, 3),
        }
        for name, pairs in times.items()
    }
    ratios = {
        what: round(
            statistics.median(b[at] / a[at] for a, b in zip(times["ours"], times["torchvision"], strict=True)), 2
        )
        for at, what in enumerate(("wall", "cpu"))
    }
    return {**rows, "ratio": ratios}


def circumstances() -> dict[str, Any]:
    """Return versions and hardware of the measurement."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    compiler = cpp_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else "none"
    decoder = jpeg.decoder()
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "pillow_libjpeg_turbo": features.version("libjpeg_turbo"),
        "our_jpeg_decoder": "Pillow" if decoder is None else decoder.__qualname__.partition(".")[0].lstrip("_"),
        "compiler": version.partition("\n")[0],
        "flags": " ".join(FLAGS),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Input pipeline against torchvision's.")
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--crops", default="resize_crop,random_crop")
    parser.add_argument("--policies", default="flip,randaugment,trivial")
    parser.add_argument("--simplejpeg", type=Path, help="folder where simplejpeg is installed (pip --target)")
    parser.add_argument("--only-reduced", action="store_true", help="measure only decoding at a reduced scale")
    parser.add_argument("--json", type=output_file(".json"))
    args = parser.parse_args()
    if args.simplejpeg is not None:
        sys.path.append(str(args.simplejpeg))
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]), "rounds": args.rounds, "images": args.images, "batch": args.batch,
        "circumstances": circumstances(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only_reduced:
            result["reduced decoding"] = reduced_decoding(folder, args.rounds)
            print(json.dumps(result["reduced decoding"], indent=1))
        else:
            make_folder(folder, args.images)
        for workers in () if args.only_reduced else map(int, args.workers.split(",")):
            for crop in args.crops.split(","):
                for policy in args.policies.split(","):
                    setting = (folder, crop, policy, args.batch, workers)
                    found = measured({"ours": ours(*setting), "torchvision": theirs(*setting)}, args.rounds)
                    result[f"{workers} workers, {crop}, {policy}"] = found
                    print(f"{workers} workers, {crop}, {policy}: {json.dumps(found)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
