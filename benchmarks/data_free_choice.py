"""Scores students of data-free runs on the *training* images of their set: what settings are chosen by.

    python benchmarks/data_free_choice.py runs/data-free/mskd-w2a2-seed0 runs/data-free-choice/*

No student reads a real image in its training. Where several settings are compared, choosing by test images would make
the chosen one look better than it is; these are others. A row a run: float and low-bit student, how often the low-bit
one decides as the teacher does, the share of each class that either gets right, and the student's settings that are not
those of the run before it. Accuracies are fractions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from stage_runs import environment
from torch import Tensor, nn

from qkd.config import RunConfig
from qkd.data import load_splits, normalize
from qkd.roles.nets import load_float_twin, load_student, load_teacher
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.identity import differences, leaves

OUT = Path(__file__).resolve().parent / "results" / "data_free_choice.json"


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
        "recall": recall(student, labels),
    }
    if run.config.student_start == "float":
        start = decisions(load_float_twin(run), images)
        found |= {"float": share(start == labels), "float_recall": recall(start, labels)}
    return found


def recall(found: Tensor, labels: Tensor) -> list[float]:
    """Return the share of each class's images that are found to be of it."""
    return [share(found[labels == label] == label) for label in range(int(labels.max()) + 1)]


def settings_of(path: Path) -> dict[str, Any]:
    """Return the settings of a run's student, dotted."""
    return dict(leaves(stored_config(path).student.model_dump(mode="json"), "student"))


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
    parser.add_argument("--out", type=Path, default=OUT, help="JSON file to write")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for before, path in zip([None, *args.runs], args.runs, strict=False):
        found = choice_of(path)
        if before is not None:
            changed = differences(settings_of(before), settings_of(path))
            found["changed"] = {key: values[1] for key, values in changed.items() if not key.endswith(".weights")}
        rows.append(found)
        print(json.dumps(found), flush=True)
    facts = {
        "what": "students scored on the training images, which none of them has read",
        "environment": environment(),
    }
    args.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
