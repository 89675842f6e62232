"""Scores students of data-free runs on the *training* images of their set: what settings are chosen by.

    python benchmarks/data_free_choice.py runs/data-free-long/*-w2a2-seed0

No student reads a real image in its training. Where several settings are compared, choosing by test images would make
the chosen one look better than it is; these are others. Prints a line a run: float and low-bit student, how often the
low-bit one decides as the teacher does, and the share of each class that the low-bit one gets right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qkd.config import RunConfig
from qkd.data import load_splits, normalize
from qkd.roles.nets import load_float_twin, load_student, load_teacher
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder


def choice_of(path: Path) -> dict[str, Any]:
    """Return what a run's students make of training images; accuracies are fractions.

    Args:
        path: Of a run whose stage ``distill`` is complete.
    """
    run = RunFolder(stored_config(path), path.resolve())
    images, labels = training_images(run.config)
    student, teacher = decisions(load_student(run), images), decisions(load_teacher(run), images)
    found = {
        "run": path.name,
        "low_bit": share(student == labels),
        "agrees": share(student == teacher),
        "recall": [share(student[labels == label] == label) for label in range(int(labels.max()) + 1)],
    }
    if run.config.student_start == "float":
        found["float"] = share(decisions(load_float_twin(run), images) == labels)
    return found


def training_images(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Return the normalized training images of a config's data set, and their labels."""
    splits = load_splits(config.data, seed=config.seed)
    raw, labels = splits.train.batch(torch.arange(len(splits.train)), "cpu")
    return normalize(raw, splits.mean, splits.std), labels


@torch.no_grad()
def decisions(net: nn.Module, images: Tensor) -> Tensor:
    """Return the class that a net decides for, of each image."""
    return torch.cat([net.eval()(part).argmax(1) for part in images.split(512)])


def share(right: Tensor) -> float:
    """Return the share of what is true, to four digits."""
    return round(float(right.double().mean()), 4)


def main() -> None:
    """Score runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    for path in parser.parse_args().runs:
        print(json.dumps(choice_of(path)), flush=True)


if __name__ == "__main__":
    main()
