"""Ablation of 2-bit training options: one per row, equal numbers of batches, several seeds, one teacher per seed.

    python benchmarks/recipes.py --data FOLDER            # with train.npz and test.npz

Every row is the baseline (learned step sizes, labels and soft targets in equal parts, running statistics of batch norm,
last epoch with frozen batch norm) with one option changed; ``recipe`` is ``student.recipe: default`` as a whole. Rows
with training before the student's (``widths``, ``quantized_features``) take its epochs from the student's, so that all
see the same number of batches; a step of ``self_distillation`` has one more forward pass. Students are scored once, on
the whole test set, after their last epoch. All of seed 0 runs first, then seed 1, ...: if stopped at any time, the
table holds what is complete. Complete runs are not repeated, interrupted ones resume. A failed run is listed in the
table with its message. ``--collect`` only collects existing runs. Extra ``key.path=value`` words are passed on to every
run. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stage_runs import (
    NOT_RUN,
    accuracy_text,
    environment_of,
    noted_failure,
    points_text,
    public,
    require_runs,
    run_with_teacher,
    runs_in,
    spread,
    unlike,
)

from qkd.cli.options.values import output_file
from qkd.config import RunConfig
from qkd.config.binding import apply_overrides, bind

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "baseline"
LABELS = {"loss": "cross_entropy"}
SOFT = {"loss": "soft_target", "options": {"temperature": 4.0}}
Task = tuple[str, int]  # row, seed


def rows_of(epochs: int) -> dict[str, dict[str, Any]]:
    """Return the rows: name -> keys of the student that differ from the baseline's.

    Args:
        epochs: Epochs of the student's training, at least 2.
    """
    half = epochs // 2
    auxiliary = {  # a teacher with 4-bit features (the input of its last layer), and 8 bits elsewhere
        "quant": {"weight_bits": 8, "act_bits": 8, "overrides": {"fc": {"act_bits": 4}}},
        "train": {"epochs": half, "lr": 0.01}, "terms": [LABELS],
    }  # fmt: skip
    features = {"loss": "hint", "weight": 0.5, "taps": [["flatten", "flatten"]]}
    return {
        BASELINE: {},
        "recipe": {"recipe": "default"},
        "labels_only": {"terms": [LABELS]},
        "soft_targets_only": {"terms": [SOFT]},
        "transition_rate": {"low_bit": {"transition_rate": 0.005}},
        "transition_rate_low": {"low_bit": {"transition_rate": 0.001}},
        "stats": {"quant": {"weight_quantizer": "stats"}},
        "decay_by_bits": {"low_bit": {"decay_by_bits": True}},
        "reestimate": {"low_bit": {"reestimate_batches": 50}},
        "dampening": {"low_bit": {"dampening": 1e-3}},
        "freezing": {"low_bit": {"oscillation_thresholds": [0.04, 0.01]}},
        "ema": {"train": {"ema_decay": 0.99}},
        "widths": {"widths": [{"weight_bits": 4, "act_bits": 4, "epochs": half}], "train": {"epochs": epochs - half}},
        "self_distillation": {"self_distillation": {}},
        "quantized_features": {
            "auxiliary": auxiliary, "terms": [LABELS, features], "train": {"epochs": epochs - half},
        },
    }  # fmt: skip


def base_config(args: argparse.Namespace) -> dict[str, Any]:
    """Return the baseline's config."""
    agent = {"policy": "crop_flip", "crop_padding": 2}
    data = {"name": "npz", "path": str(args.data), "batch_size": args.batch_size, "val_fraction": 0}
    fast = {"precision": args.precision, "memory_format": "channels_last"}
    return {
        "threads": 1,
        "data": {**data, **({"train_limit": args.images} if args.images else {})},
        "teacher": {
            "net": args.net, "train": {"epochs": 2 * args.epochs, "lr": 0.1, "warmup_epochs": 1, **fast},
            "agent": agent,
        },
        "student": {
            "quant": {"weight_bits": args.bits, "act_bits": args.bits},
            "train": {"epochs": args.epochs, "lr": args.lr, "weight_decay": args.weight_decay, **fast},
            "terms": [{**LABELS, "weight": 0.5}, {**SOFT, "weight": 0.5}],
            "agent": agent,
        },
    }  # fmt: skip


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested mappings with others merged over them; a recipe sets the terms, so the base's are dropped."""
    result = {key: value for key, value in base.items() if not (key == "terms" and "recipe" in changes)}
    for key, value in changes.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(value, Mapping) and isinstance(inner, Mapping) else value
    return result


class Ablation:
    """The runs, their folders and inputs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.base, self.rows = args, base_config(args), rows_of(args.epochs)

    def train_teacher(self, seed: int) -> str:
        """Train the teacher of a seed; return why that failed, or an empty string."""
        return self._run(self.base, f"teacher-seed{seed}", seed, ("teacher",))

    def run(self, task: Task) -> str:
        """Run a task; return why it failed, or an empty string."""
        name, seed = task
        stages = ("teacher", "search", "distill")
        return self._run(self._values(name), f"{name}-seed{seed}", seed, stages, f"teacher-seed{seed}")

    def _values(self, name: str) -> dict[str, Any]:
        return {**self.base, "student": merged(self.base["student"], self.rows[name])}

    def _config(self, values: Mapping[str, Any], name: str, seed: int) -> RunConfig:
        return bind(apply_overrides(values, [f"name={name}", f"seed={seed}", *self.args.overrides]))

    def _run(
        self, values: Mapping[str, Any], name: str, seed: int, stages: tuple[str, ...], teacher: str | None = None
    ) -> str:
        folder = self.args.runs_dir
        source = None if teacher is None else folder / teacher
        return run_with_teacher(lambda: self._config(values, name, seed), name, folder, stages, source)

    def result(self, task: Task, failure: str | None) -> dict[str, Any]:
        """Return the outcome of a task."""
        name, seed = task
        row: dict[str, Any] = {"option": name, "seed": seed}
        run = self.args.runs_dir / f"{name}-seed{seed}"
        failure = noted_failure(self.args.runs_dir, run.name) if failure is None else failure
        if failure or not (run / "student" / "result.json").is_file():
            return {**row, "failed": failure or NOT_RUN}
        if other := unlike(run, lambda: self._config(self._values(name), run.name, seed)):
            return {**row, "failed": other}
        student = json.loads((run / "student" / "result.json").read_text())
        lines = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
        return {
            **row,
            "accuracy": student["test_accuracy"],
            "teacher_accuracy": json.loads((run / "teacher" / "result.json").read_text())["test_accuracy"],
            "seconds": round(student["seconds"], 1),
            "train_accuracy": lines[-1]["train_accuracy"],
            "facts": lines[-1].get("facts", {}),
        }


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per option, best first: spread over seeds, and mean difference from the baseline."""
    good = {(row["option"], row["seed"]): row["accuracy"] for row in rows if "failed" not in row}
    lines = []
    for name in dict.fromkeys(row["option"] for row in rows):
        mine = {seed: value for (option, seed), value in good.items() if option == name}
        paired = [value - good[BASELINE, seed] for seed, value in mine.items() if (BASELINE, seed) in good]
        lines.append({
            "option": name, **spread(list(mine.values())),
            "to_baseline": round(statistics.mean(paired), 5) if paired else None,
            "to_baseline_stdev": round(statistics.stdev(paired), 5) if len(paired) > 1 else None,
            "failures": [row["failed"] for row in rows if row["option"] == name and "failed" in row],
        })  # fmt: skip
    return sorted(lines, key=lambda line: -line.get("mean", 0))


def markdown(record: Mapping[str, Any]) -> str:
    """Return the record as a readable table."""
    facts = record["environment"]
    text = [
        "# Options of a low-bit training", "",
        f"{record['what']}: {record['budget']}. Seeds {', '.join(map(str, record['seeds']))}; last epoch, test images "
        f"read once. ± is the standard deviation of the seeds; `to baseline` the mean difference to it of the same "
        f"seeds, in points, ± that of the seeds. Teacher: {accuracy_text(record['teacher'])}.", "",
        f"Made by `python benchmarks/recipes.py` on {facts['cpu']} ({facts['cores']} cores), torch {facts['torch']}, "
        f"brevitas {facts['brevitas']}, {facts['date']}.", "",
        "| option | accuracy | to baseline |", "|---|---|---|",
    ]  # fmt: skip
    for line in record["table"]:
        difference = points_text(line["to_baseline"], line["to_baseline_stdev"])
        text.append(f"| {line['option']} | {accuracy_text(line)} | {difference} |")
    return "\n".join([*text, ""])


def write(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write OUT.json and OUT.md, and print the table."""
    teachers = {row["seed"]: row["teacher_accuracy"] for row in rows if "failed" not in row}
    record = {
        "what": f"Test accuracy of W{args.bits}A{args.bits} students by option of their training",
        "budget": f"{args.net}, {args.images or 'all'} training images, {args.epochs} epochs in batches of "
        f"{args.batch_size}, learning rate {args.lr}, weight decay {args.weight_decay}, precision {args.precision}",
        "seeds": args.seeds,
        "overrides": public(args.overrides),
        "environment": environment_of(runs_in(args.runs_dir)),
        "teacher": spread(list(teachers.values())),
        "options": rows_of(args.epochs),
        "table": summarize(rows),
        "rows": list(rows),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = tuple(rows_of(2))
    made.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    made.add_argument("--data", type=Path, required=True, help="folder with train.npz and test.npz")
    made.add_argument("--net", default="resnet20")
    made.add_argument("--images", type=int, default=0, help="training images of each run (0 for all)")
    made.add_argument("--epochs", type=int, default=6, help="epochs of the student; the teacher has twice as many")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--bits", type=int, default=2)
    made.add_argument("--lr", type=float, default=0.02)
    made.add_argument("--weight-decay", type=float, default=1e-4)
    made.add_argument("--precision", default="bf16")
    made.add_argument("--options", nargs="+", choices=known, default=list(known), metavar="OPTION", help=str(known))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    made.add_argument("--runs-dir", type=Path, default=Path("runs/recipes"))
    made.add_argument("--collect", action="store_true", help="only collect existing runs")
    made.add_argument(
        "--out", type=output_file(), default=ROOT / "benchmarks" / "results" / "recipes", help="without suffix"
    )
    return made


def main() -> None:
    """Parse the command line, run what is missing, write table and record after each seed."""
    made = parser()
    args = made.parse_args()
    if args.epochs < 2:
        made.error("--epochs must be at least 2: some options divide them into phases")
    if args.collect:
        require_runs(made, args.runs_dir)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    ablation, failures = Ablation(args), dict[Task, str]()
    tasks = [(name, seed) for seed in args.seeds for name in args.options]
    for seed in () if args.collect else args.seeds:
        ablation.train_teacher(seed)
        for name in args.options:
            failures[name, seed] = ablation.run((name, seed))
        write(args, [ablation.result(task, failures.get(task)) for task in tasks])
    if args.collect:
        write(args, [ablation.result(task, None) for task in tasks])


if __name__ == "__main__":
    main()
