"""Scores students of data-free runs on the *training* images of their set, as a basis for choosing settings.

    python benchmarks/data_free_choice.py runs/data-free/mskd-w2a2-seed0 runs/data-free-choice/*

No student sees a real image in training. When several settings are compared, choosing by test images would make the
chosen one look better than it is; these are other images. One row per run: float and low-bit student, how often the
low-bit one agrees with the teacher, the recall of each class for both, and the student's settings that differ from
those of the previous run. Accuracies are fractions.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from stage_runs import environment
from torch import Tensor, nn

from qkd.cli.options.values import output_file
from qkd.config import RunConfig
from qkd.data import load_splits, normalize
from qkd.roles.nets import load_float_twin, load_student, load_teacher
from qkd.roles.stored import stored_config
from qkd.run.folder import RunFolder
from qkd.run.identity import differences, leaves

OUT = Path(__file__).resolve().parent / "results" / "data_free_choice.json"


def choice_of(path: Path) -> dict[str, Any]:
    """Return the scores of a run's students on training images; accuracies are fractions.

    Args:
        path: Folder of a run whose stage ``distill`` is complete.
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
    """Return the recall of each class."""
    return [share(found[labels == label] == label) for label in range(int(labels.max()) + 1)]


def settings_of(path: Path) -> dict[str, Any]:
    """Return the settings of a run's student, with dotted keys."""
    return dict(leaves(stored_config(path).student.model_dump(mode="json"), "student"))


def training_images(config: RunConfig) -> tuple[Tensor, Tensor]:
    """Return the normalized training images of a config's data set, and their labels."""
    splits = load_splits(config.data, seed=config.seed)
    raw, labels = splits.train.batch(torch.arange(len(splits.train)), "cpu")
    return normalize(raw, splits.mean, splits.std), labels


@torch.no_grad()
def decisions(net: nn.Module, images: Tensor) -> Tensor:
    """Return the class that a net predicts for each image."""
    return torch.cat([net.eval()(part).argmax(1) for part in images.split(512)])


def share(right: Tensor) -> float:
    """Return the fraction of true values, to four digits."""
    return round(float(right.double().mean()), 4)


def main() -> None:
    """Score runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=output_file(".json"), default=OUT, help="JSON file to write")
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
