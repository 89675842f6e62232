"""Compares distillation methods on one pair with one budget: accuracy with spread, both widths, several seeds.

    python benchmarks/methods.py --jobs 2

Every method is a config in ``configs/digits/methods``. What defines it (terms, phases, partners, start) replaces the
same keys of the base config, with phases stretched to its epochs, so that all students see the same number of batches.
All rows of a seed have the same teacher, except for methods whose teacher is part of the method; these train their own.
Students are scored once, on the whole test set, after their last epoch. Complete runs are not repeated. A failed run is
listed in the table with its message. With ``--steps FILE`` (written by ``method_steps.py``) the table also has time and
memory of a step. Extra ``key.path=value`` words are passed on to every run. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
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
from qkd.data import load_splits
from qkd.files.yaml_text import parse_yaml
from qkd.training.assembly import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "configs" / "digits" / "methods"
PLAIN, KD = "plain", "soft_targets"
OF_ANOTHER_PAIR = ("self-distillation",)  # its student has the teacher's net
SHARED = ("net", "quant", "float_train", "train", "agent")  # keys of the student: the same for all methods
TEACHER = ("untrained", "members", "ensemble")  # keys of the teacher that are specific to a method
STAGES = ("teacher", "search", "distill")
Task = tuple[str, int, int]  # method, bits, seed
Shared = tuple[str, dict[str, Any], int]  # kind of teacher, its config, seed


def merged(base: dict[str, Any], method: dict[str, Any]) -> dict[str, Any]:
    """Return the base config with a method's keys; the phases have the base's total length, the rate is the base's.

    Args:
        base: Nested mappings of the base config.
        method: Those of a method's config, whose phases add up to its ``student.train.epochs``.
    """
    own, student = method["student"], dict(base["student"])
    student = {key: value for key, value in student.items() if key in SHARED}
    student |= {key: value for key, value in own.items() if key not in SHARED}
    epochs = student["train"]["epochs"]
    if own.get("init") == "random":  # training from scratch needs the learning rate of training from scratch
        student["train"] = {**student["train"], "lr": student["float_train"]["lr"]}
    if "phases" in student:
        lengths = stretched([phase["epochs"] for phase in student["phases"]], epochs)
        student["phases"] = [{**phase, "epochs": n} for phase, n in zip(student["phases"], lengths, strict=True) if n]
    teacher = {**base["teacher"], **{key: value for key, value in method["teacher"].items() if key in TEACHER}}
    if teacher.get("untrained"):
        teacher.pop("train")
    return {**base, "teacher": teacher, "student": student}


def stretched(lengths: Sequence[int], total: int) -> list[int]:
    """Return integer lengths in about the same proportions that add up to ``total``, at least 1 each."""
    ends = [round(sum(lengths[: index + 1]) * total / sum(lengths)) for index in range(len(lengths))]
    found = [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    found[found.index(max(found))] += total - sum(found)
    return found


def teacher_kind(name: str, config: dict[str, Any]) -> str | None:
    """Return which trained teacher a method uses: ``"teacher"``, another kind of teacher (an ensemble), or None (its
    runs train it with the student, or with branches)."""
    joint = (config["student"].get("rotations") or {}).get("teacher_branches", {}).get("joint", False)
    if joint or config["teacher"].get("untrained"):
        return None
    return f"teacher-{name}" if config["teacher"].get("members") else "teacher"


class Comparison:
    """The runs of the comparison: their folders and inputs."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.runs_dir
        self.base = parse_yaml(args.config.read_text())
        self.configs = {name: merged(self.base, parse_yaml(self.file(name).read_text())) for name in args.methods}

    @staticmethod
    def file(name: str) -> Path:
        """Return a method's config."""
        return METHODS / f"{name}.yaml"

    def run(self, task: Task) -> str:
        """Run a task; return why it failed, or an empty string."""
        name, _, seed = task
        kind = teacher_kind(name, self.configs[name])
        teacher = self.folder / f"{kind}-seed{seed}" if kind else None
        return self._stages(self._values(task), run_name(task), seed, STAGES, teacher)

    def _values(self, task: Task) -> dict[str, Any]:
        name, bits, seed = task
        config: dict[str, Any] = json.loads(json.dumps(self.configs[name]))
        config["student"]["quant"] |= {"weight_bits": bits, "act_bits": bits}
        if config["student"].get("init", "auto") == "auto":  # all of a seed start from the same float student
            config["student"]["weights"] = str((self.start(seed) / "student" / "float" / WEIGHTS).resolve())
            config["student"].pop("float_train")
        return config

    def _config(self, values: dict[str, Any], name: str, seed: int) -> RunConfig:
        return bind(apply_overrides(values, [f"name={name}", f"seed={seed}", *self.args.overrides]))

    def shared(self) -> list[Shared]:
        """Return what the runs share: each kind of teacher, and the float student, for each seed."""
        kinds = {teacher_kind(name, config): config["teacher"] for name, config in self.configs.items()}
        kinds["teacher"] = self.base["teacher"]
        return [(kind, kinds[kind], seed) for seed in self.args.seeds for kind in kinds if kind]

    def train_shared(self, shared: Shared) -> str:
        """Train a teacher, and for the common one also the float student (and an epoch of distillation)."""
        kind, teacher, seed = shared
        folder = self.folder / f"{kind}-seed{seed}"
        why = self._stages({**self.base, "teacher": teacher}, folder.name, seed, ("teacher",))
        if why or kind != "teacher":
            return why
        train = {**self.base["student"]["train"], "epochs": 1}
        start = {**self.base, "student": {**self.base["student"], "train": train}}
        return self._stages(start, self.start(seed).name, seed, STAGES, folder)

    def start(self, seed: int) -> Path:
        """Return the run folder of the float student that the students of a seed start from."""
        return self.folder / f"start-seed{seed}"

    def float_students(self) -> list[float]:
        """Return the test accuracies of the trained float students."""
        files = [self.start(seed) / "student" / "float" / "result.json" for seed in self.args.seeds]
        return [json.loads(file.read_text())["test_accuracy"] for file in files if file.is_file()]

    def _stages(
        self, values: dict[str, Any], name: str, seed: int, stages: tuple[str, ...], teacher: Path | None = None
    ) -> str:
        """Run stages in this process, with another folder's teacher if given; return why they failed, or ''."""
        return run_with_teacher(lambda: self._config(values, name, seed), name, self.folder, stages, teacher)

    def row(self, task: Task, failure: str | None) -> dict[str, Any]:
        """Return the outcome of a task."""
        name, bits, seed = task
        row: dict[str, Any] = {"method": name, "bits": bits, "seed": seed}
        run = self.folder / run_name(task)
        failure = noted_failure(self.folder, run.name) if failure is None else failure
        if failure or not (run / "student" / "result.json").is_file():
            return {**row, "failed": failure or NOT_RUN}
        if other := unlike(run, lambda: self._config(self._values(task), run.name, seed)):
            return {**row, "failed": other}
        student = json.loads((run / "student" / "result.json").read_text())
        teacher = json.loads((run / "teacher" / "result.json").read_text())
        lines = [json.loads(line) for line in (run / "student" / "metrics.jsonl").read_text().splitlines()]
        return {
            **row,
            "accuracy": student["test_accuracy"],
            "teacher_accuracy": teacher["test_accuracy"],
            "seconds": round(student["seconds"], 1),
            "first_train_accuracy": lines[0]["train_accuracy"],
            "last_train_accuracy": lines[-1]["train_accuracy"],
        }


def run_name(task: Task) -> str:
    """Return the name of a task's run folder."""
    return f"{task[0]}-w{task[1]}a{task[1]}-seed{task[2]}"


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per method and width, best first within a width: spread and mean difference from plain KD."""
    good = {(row["method"], row["bits"], row["seed"]): row["accuracy"] for row in rows if "failed" not in row}
    table = []
    for bits in sorted({row["bits"] for row in rows}):
        lines = []
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = {seed: value for (method, width, seed), value in good.items() if (method, width) == (name, bits)}
            paired = [value - good[KD, bits, seed] for seed, value in mine.items() if (KD, bits, seed) in good]
            failed = [row["failed"] for row in rows if (row["method"], row["bits"]) == (name, bits) and "failed" in row]
            difference = round(statistics.mean(paired), 5) if paired else None
            scatter = round(statistics.stdev(paired), 5) if len(paired) > 1 else None
            lines.append({"method": name, "bits": bits, **spread(list(mine.values())), "to_kd": difference,
                          "to_kd_stdev": scatter, "failures": failed})  # fmt: skip
        table += sorted(lines, key=lambda line: -line.get("mean", 0))
    return table


def markdown(record: dict[str, Any]) -> str:
    """Return the record as a readable table."""
    steps = record.get("steps") or {}
    facts = record["environment"]
    text = [
        "# Distillation methods on one pair", "",
        f"{record['what']}. {len(record['seeds'])} seeds ({', '.join(map(str, record['seeds']))}); "
        f"{record['pair']}. Last epoch, {record['test_images']} test images read once. ± is the standard deviation of "
        f"the seeds; `to KD` the mean difference to `{KD}` of the same seed, in points, ± that of the seeds. "
        f"Teacher: {accuracy_text(record['teacher'])}; the student's net in float: "
        f"{accuracy_text(record['float_student'])}.", "",
        f"Made by `python benchmarks/methods.py` on {facts['cpu']} ({facts['cores']} cores), torch {facts['torch']}, "
        f"brevitas {facts['brevitas']}, {facts['date']}. Left out: {', '.join(OF_ANOTHER_PAIR)}, whose student has the "
        f"teacher's net.", "",
    ]  # fmt: skip
    for bits in sorted({line["bits"] for line in record["table"]}):
        text += [f"## W{bits}A{bits}", "", "| method | accuracy | to KD | time of a step / KD | memory / KD |",
                 "|---|---|---|---|---|"]  # fmt: skip
        for line in (line for line in record["table"] if line["bits"] == bits):
            step = steps.get(f"{line['method']}-w{bits}a{bits}", {})
            figures = [f"{step[key]:.2f}" if key in step else "" for key in ("time_ratio", "memory_ratio")]
            difference = points_text(line["to_kd"], line["to_kd_stdev"])
            text.append(f"| {line['method']} | {accuracy_text(line)} | {difference} | {' | '.join(figures)} |")
        text.append("")
        sums = {name.split("+")[0]: row for name, row in steps.items() if name.endswith(f"+sum-w{bits}a{bits}")}
        if sums:
            told = ", ".join(f"{name} {row['time_ratio']:.2f}" for name, row in sums.items())
            text += [
                f"Without the clipping of gradients, which takes a second backward pass, a step takes: {told}.",
                "",
            ]
    return "\n".join(text)


def main() -> None:
    """Parse the command line, run what is missing, write table and record."""
    known = sorted(path.stem for path in METHODS.glob("*.yaml") if path.stem not in OF_ANOTHER_PAIR)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "fashion-mnist" / "methods.yaml")
    parser.add_argument("--methods", nargs="+", choices=known, default=known, metavar="METHOD", help=", ".join(known))
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--collect", action="store_true", help="only collect existing runs")
    parser.add_argument("--steps", type=Path, help="output of method_steps.py")
    parser.add_argument(
        "--out", type=output_file(), default=ROOT / "benchmarks" / "results" / "methods", help="without suffix"
    )
    args = parser.parse_args()
    if args.collect:
        require_runs(parser, args.runs_dir)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    tasks = [(name, bits, seed) for seed in args.seeds for bits in args.bits for name in args.methods]
    failures: dict[Task, str] = {}
    if not args.collect:
        # processes, not threads: steps of small nets hold the GIL; one process per run would import PyTorch every time
        with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(comparison.train_shared, comparison.shared()))
            failures = dict(zip(tasks, pool.map(comparison.run, tasks), strict=True))
    rows = [comparison.row(task, failures.get(task)) for task in tasks]
    write(args, comparison, rows)


def write(args: argparse.Namespace, comparison: Comparison, rows: list[dict[str, Any]]) -> None:
    """Write OUT.json and OUT.md, and print the table."""
    config = bind(apply_overrides(comparison.base, args.overrides))
    shared = {row["seed"]: row["teacher_accuracy"] for row in rows if row["method"] == KD and "failed" not in row}
    facts = environment_of(runs_in(args.runs_dir))
    record = {
        "what": "Test accuracy of low-bit students by distillation method, equal budgets",
        "pair": f"{config.teacher.net} -> {config.student_net}, {config.data.train_limit or 'all'} training images of "
        f"{comparison.base['data']['name']}, {config.student.train.epochs} epochs",
        "test_images": len(load_splits(config.data, seed=0).test),
        "seeds": args.seeds,
        "overrides": public(args.overrides),
        "environment": facts,
        "teacher": spread(list(shared.values())),
        "float_student": spread(comparison.float_students()),
        "table": summarize(rows),
        "steps": json.loads(args.steps.read_text())["rows"] if args.steps else {},
        "rows": rows,
    }
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = markdown(record)
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
