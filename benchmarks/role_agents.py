"""Compares augmentation agents for one teacher and its low-bit student: fixed, searched once, searched per role.

    python benchmarks/role_agents.py configs/fashion-mnist/role_agents.yaml --seeds 0 1 2 --jobs 2

Twelve arms per seed. Both roles use an arm's policy: the teacher is trained with it, and the student distilled with it.
A teacher is trained once per seed and policy; its search serves every arm that uses it, and so does the student's,
which arm `role_wise` runs and its views replay. All arms of a seed have the same images, initial weights and order of
batches. Complete stages are not repeated: the same command continues where it was stopped. A failed run is listed in
the table with its message. Extra `key.path=value` words are passed on to every run. Writes OUT.json, OUT.md and
OUT.svg; `--collect` does so from existing runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from role_agents_reasons import reasons, search_facts
from role_agents_table import draw, render, summarize
from stage_runs import environment_of, public, require_runs, run_stages, runs_in, unlike

from qkd.cli.options.values import output_file
from qkd.config.binding import load_config
from qkd.files import write_json, write_text


@dataclass(frozen=True)
class Arm:
    """A way to augment.

    Args:
        teacher: Policy for training its teacher.
        student: Policy for distilling its student; ``found`` replays what arm ``role_wise`` found.
        view: What the teacher sees while teaching: the student's images, its own agent's, or clean ones.
    """

    teacher: str
    student: str
    view: str = "same"

    @property
    def searches(self) -> tuple[str, ...]:
        """The searches that it uses, its own or another arm's."""
        roles = {"teacher": self.teacher == "search", "student": self.student in ("search", "found")}
        return tuple(role for role, is_used in roles.items() if is_used)


ARMS = {
    "crop_flip": Arm("crop_flip", "crop_flip"),
    "trivial": Arm("trivial", "trivial"),
    "randaugment": Arm("randaugment", "randaugment"),
    "cutmix": Arm("cutmix", "cutmix"),
    "shared": Arm("search", "teacher"),
    "role_wise": Arm("search", "search"),
    "trivial_own": Arm("trivial", "trivial", "own"),
    "trivial_clean": Arm("trivial", "trivial", "clean"),
    "shared_own": Arm("search", "teacher", "own"),
    "shared_clean": Arm("search", "teacher", "clean"),
    "role_wise_own": Arm("search", "found", "own"),
    "role_wise_clean": Arm("search", "found", "clean"),
}
FINDER = "role_wise"  # the arm that runs the student's search
FIXED = ("trivial", "randaugment", "cutmix")  # fixed policies, of which the best is a rival
PLAIN = "crop_flip"
TASKS = "tasks.jsonl"  # in the runs folder: one line per finished run, over all calls of this program


@dataclass(frozen=True)
class Runs:
    """The folders and inputs of the runs of a comparison.

    Args:
        config: Path of the config.
        folder: Folder of the run folders.
        words: Overrides for every run.
    """

    config: str
    folder: Path
    words: tuple[str, ...]

    def teacher(self, policy: str, seed: int) -> Path:
        """Return the run folder of a teacher."""
        return self.folder / f"teacher-{policy}-seed{seed}"

    def arm(self, name: str, seed: int) -> Path:
        """Return the run folder of an arm."""
        return self.folder / f"{name}-seed{seed}"

    def train_teacher(self, policy: str, seed: int) -> str:
        """Train a teacher, after the search of its agent if that is its policy; return why it failed, or ''."""
        words = [f"seed={seed}", f"teacher.agent.policy={policy}", "student.agent.policy=crop_flip"]
        return self._run(self.teacher(policy, seed), words, "teacher")

    def distil(self, name: str, seed: int) -> str:
        """Distill an arm's student, after its agent's own search if any; return why it failed, or an empty string."""
        arm = ARMS[name]
        if not (self.teacher(arm.teacher, seed) / "teacher" / "result.json").is_file():
            return "teacher: failed"
        return self._run(self.arm(name, seed), self.arm_words(arm, seed), "distill")

    def arm_words(self, arm: Arm, seed: int) -> list[str]:
        """Return the overrides of an arm, given the runs that provide its teacher and its schedules."""
        source = self.teacher(arm.teacher, seed)
        words = [f"seed={seed}", f"student.view={arm.view}", "teacher.train=null"]
        words.append(f"teacher.weights={source / 'teacher' / 'weights.safetensors'}")
        words += _agent("teacher", arm.teacher, source if arm.teacher == "search" else None)
        is_found = arm.student == "found"
        return words + _agent("student", arm.student, self.arm(FINDER, seed) if is_found else None)

    def _run(self, path: Path, words: Sequence[str], until: str) -> str:
        words = [*self.words, *words]  # an arm's come last: `teacher.train.epochs=3` must not train its teacher again
        return run_stages(self.config, path.name, words, self.folder, until=until)


def _agent(role: str, policy: str, found_in: Path | None) -> list[str]:
    """Return a role's policy as overrides; that of a search elsewhere as its schedule file."""
    if found_in is None:
        return [f"{role}.agent.policy={policy}"]
    file = found_in / "search" / f"{role}.schedule.yaml"
    return [f"{role}.agent.policy=file", f"{role}.agent.schedule={file}"]


def waves(arms: Sequence[str], seeds: Sequence[int]) -> list[list[tuple[str, str, int]]]:
    """Return tasks ``(kind, name, seed)`` in waves: teachers, arms, arms that replay another's search.

    Args:
        arms: Names; the finder is added if an arm replays its search.
        seeds: Seeds of the runs.
    """
    needed = [*arms, *([FINDER] if FINDER not in arms and any(ARMS[name].student == "found" for name in arms) else [])]
    policies = sorted({ARMS[name].teacher for name in needed}, key=lambda policy: policy != "search")  # longest first
    first = sorted((name for name in needed if ARMS[name].student != "found"), key=lambda name: name != FINDER)
    second = [name for name in needed if ARMS[name].student == "found"]
    kinds = (("teacher", policies), ("arm", first), ("arm", second))
    return [[(kind, name, seed) for name in names for seed in seeds] for kind, names in kinds]


def run_all(runs: Runs, arms: Sequence[str], seeds: Sequence[int], jobs: int) -> dict[tuple[str, str, int], str]:
    """Run everything, ``jobs`` in parallel; return why tasks failed, empty for those that did not."""
    failures: dict[tuple[str, str, int], str] = {}

    def take(task: tuple[str, str, int]) -> None:
        kind, name, seed = task
        started = time.monotonic()
        work: Callable[[str, int], str] = runs.train_teacher if kind == "teacher" else runs.distil
        failures[task] = work(name, seed)
        outcome, seconds = failures[task] or "done", round(time.monotonic() - started, 1)
        print(f"{kind} {name}, seed {seed}: {outcome} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        line = json.dumps({"kind": kind, "name": name, "seed": seed, "outcome": outcome, "seconds": seconds})
        with (runs.folder / TASKS).open("a", encoding="utf-8") as log:
            log.write(line + "\n")

    with ThreadPoolExecutor(jobs) as pool:
        for wave in waves(arms, seeds):
            list(pool.map(take, wave))
    return failures


def noted_failures(runs: Runs) -> dict[tuple[str, str, int], str]:
    """Return why tasks failed when they were last tried, by an earlier call of this program."""
    log = runs.folder / TASKS
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    last = {(line["kind"], line["name"], line["seed"]): line["outcome"] for line in lines}
    return {task: outcome for task, outcome in last.items() if outcome != "done"}


def read_row(runs: Runs, name: str, seed: int, failures: dict[tuple[str, str, int], str]) -> dict[str, Any]:
    """Return an arm's row of one seed: accuracies, times and the cost of its searches; or why there is none."""
    arm, row = ARMS[name], {"arm": name, "seed": seed}
    teacher_run, run = runs.teacher(arm.teacher, seed), runs.arm(name, seed)
    why = failures.get(("teacher", arm.teacher, seed)) or failures.get(("arm", name, seed))
    try:
        teacher = json.loads((teacher_run / "teacher" / "result.json").read_text())
        student = json.loads((run / "student" / "result.json").read_text())
    except FileNotFoundError:
        return {**row, "failed": why or "not run to its end"}
    why = why or unlike(run, lambda: load_config(runs.config, [*runs.words, *runs.arm_words(arm, seed)]))
    if why:
        return {**row, "failed": why}
    where = {"teacher": teacher_run, "student": runs.arm(FINDER, seed)}
    costs = [json.loads((where[role] / "search" / f"{role}.cost.json").read_text()) for role in arm.searches]
    return {
        **row,
        "teacher_accuracy": teacher["test_accuracy"],
        "teacher_val_accuracy": teacher["val_accuracy"],
        "student_accuracy": student["test_accuracy"],
        "student_val_accuracy": student["val_accuracy"],
        "teacher_seconds": round(teacher["seconds"], 1),
        "student_seconds": round(student["seconds"], 1),
        "search_seconds": round(sum(cost["seconds"] for cost in costs), 1),
        "search_trained_images": sum(cost["run"]["trained_images"] for cost in costs),
        "search_validated_images": sum(cost["run"]["validated_images"] for cost in costs),
    }


def read_searches(runs: Runs, arms: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return the facts about each finished search: role, seed, scores, strength of the result."""
    roles = sorted({role for name in arms for role in ARMS[name].searches}, reverse=True)
    where = {"teacher": lambda seed: runs.teacher("search", seed), "student": lambda seed: runs.arm(FINDER, seed)}
    folders = [(role, seed, where[role](seed) / "search") for role in roles for seed in seeds]
    return [
        {"role": role, "seed": seed, **search_facts(folder, role)}
        for role, seed, folder in folders
        if (folder / f"{role}.schedule.yaml").is_file()
    ]


def task_seconds(runs: Runs) -> float:
    """Return the total time of all runs, over all calls of this program."""
    log = runs.folder / TASKS
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return float(round(sum(json.loads(line)["seconds"] for line in lines), 1))


def settings(runs: Runs) -> dict[str, Any]:
    """Return the figures of the config that a reader of the table needs."""
    config = load_config(runs.config, list(runs.words))
    train = config.teacher.train
    return {
        "teacher_net": config.teacher.net, "student_net": config.student_net,
        "weight_bits": config.student.quant.weight_bits, "act_bits": config.student.quant.act_bits,
        "train_images": config.data.train_limit, "val_fraction": config.data.val_fraction,
        "batch_size": config.data.batch_size, "teacher_epochs": train.epochs if train else 0,
        "student_epochs": config.student.train.epochs,
        "search": config.search.model_dump(mode="json", include={"members", "epochs", "interval_epochs",
                                                                 "train_images", "val_images"}),
    }  # fmt: skip


def main() -> None:
    """Parse the command line, run, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config whose teacher and student are compared; its agents are replaced")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/role_agents"))
    parser.add_argument("--collect", action="store_true", help="only collect existing runs; run nothing")
    parser.add_argument(
        "--out", type=output_file(), default=Path("benchmarks/results/role_agents"), help="without suffix"
    )
    args, more = parser.parse_known_args()
    if wrong := [word for word in [*args.overrides, *more] if "=" not in word or word.startswith("-")]:
        parser.error(f"unknown argument(s): {' '.join(wrong)}")
    if args.collect:
        require_runs(parser, args.runs_dir)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    runs = Runs(args.config, args.runs_dir.resolve(), (*args.overrides, *more))
    started = time.monotonic()
    failures = noted_failures(runs) if args.collect else run_all(runs, args.arms, args.seeds, args.jobs)
    rows = [read_row(runs, name, seed, failures) for name in args.arms for seed in args.seeds]
    searches = read_searches(runs, args.arms, args.seeds)
    record = {
        "what": "last-epoch test accuracy of students by augmentation agent",
        "config": args.config,
        "overrides": public(runs.words),
        "seeds": args.seeds,
        "jobs": args.jobs,
        "wall_seconds": None if args.collect else round(time.monotonic() - started),
        "task_seconds": task_seconds(runs),
        "settings": settings(runs),
        "environment": environment_of(runs_in(args.runs_dir)),
        "arms": {name: vars(ARMS[name]) for name in args.arms},
        **summarize(rows, args.arms, plain=PLAIN, fixed=FIXED),
        "reasons": reasons(rows, searches),
        "searches": searches,
        "rows": rows,
    }
    print(render(record))
    write_json(args.out.with_suffix(".json"), record)
    write_text(args.out.with_suffix(".md"), render(record))
    write_text(args.out.with_suffix(".svg"), draw(record))


if __name__ == "__main__":
    main()
