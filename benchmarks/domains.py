"""Measures low-bit students in a domain without training labels: a gradient filter, and an adapting teacher.

    python benchmarks/domains.py
    python benchmarks/domains.py --parts adaptation --seeds 0

Part ``filter``: configs/digits/domains/filtered.yaml with each of its domains left out once, compared with plain soft
targets; all students of a domain and seed share one teacher and start from one float student. Part ``adaptation``:
configs/digits/domains/adaptation.yaml in float, W4A4 and W2A2, compared with the same without the other domain's
images: a teacher that saw only the source, and soft targets from it. Both start from the same teacher for a seed.
Students are scored once, on the test images in the unseen domain, after their last epoch. One process, one run after
another; complete runs are not repeated, and a failed run is listed in the table with its message. Extra
``key.path=value`` words are passed on to every run. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage_runs import NOT_RUN, environment_of, noted_failure, public, require_runs, run_with_teacher, spread

from qkd.cli.options.values import output_file
from qkd.config import RunConfig
from qkd.config.binding import apply_overrides, bind
from qkd.files.yaml_text import parse_yaml
from qkd.training.assembly import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "digits" / "domains"
PARTS = ("adaptation", "filter")
STAGES = ("teacher", "search", "distill")
BITS = (4, 2)  # the first trains the float student
PLAIN = "soft_target"
FILTERS: dict[str, dict[str, Any]] = {
    PLAIN: {"loss": "soft_target", "options": {"temperature": 4}},
    "confident": {"loss": "filtered_soft_target", "options": {"temperature": 4, "criterion": "confident"}},
}


@dataclass(frozen=True)
class Run:
    """One run of the comparison.

    Args:
        part: ``filter`` or ``adaptation``.
        method: The method.
        unseen: Domain of the test images.
        bits: Bits of the student.
        seed: Seed of the run.
    """

    part: str
    method: str
    unseen: str
    bits: int
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.part}-{self.method}-{self.unseen}-w{self.bits}a{self.bits}-seed{self.seed}"


def config_of(part: str) -> dict[str, Any]:
    """Return the config of a part as plain data."""
    file = CONFIGS / ("filtered.yaml" if part == "filter" else "adaptation.yaml")
    return dict(parse_yaml(file.read_text()))


def runs_of(part: str, seeds: Sequence[int]) -> Iterator[Run]:
    """Yield the runs of a part, those that others depend on first."""
    data = config_of(part)["data"]
    for seed in seeds:
        if part == "adaptation":
            yield from (
                Run(part, method, data["unseen_domain"], bits, seed)
                for method in ("source_only", "adaptation") for bits in BITS
            )  # fmt: skip
        else:
            yield from (Run(part, method, unseen, 2, seed) for unseen in data["domains"] for method in FILTERS)


def values_of(run: Run) -> dict[str, Any]:
    """Return the config of a run as plain data."""
    values = config_of(run.part)
    student = values["student"]
    student["quant"] |= {"weight_bits": run.bits, "act_bits": run.bits}
    values["data"]["unseen_domain"] = run.unseen
    if run.part == "filter":
        task, _ = student["terms"]
        student["terms"] = [task, {"weight": student["terms"][1]["weight"], **FILTERS[run.method]}]
    elif run.method == "source_only":
        student.pop("adaptation")
    return values


class Comparison:
    """The runs of the comparison and their outcomes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.runs_dir
        self.runs = [run for part in args.parts for run in runs_of(part, args.seeds)]

    def run(self) -> None:
        """Run everything, and write the table after each run."""
        for run in self.runs:
            self._run(run)
            self.write()

    def _run(self, run: Run) -> None:
        teacher = self._first(run, any_method=True)
        source = None if teacher == run else self.folder / teacher.name
        run_with_teacher(lambda: self._config(run), run.name, self.folder, STAGES, source)

    def _config(self, run: Run) -> RunConfig:
        values = values_of(run)
        start = self._first(run, any_method=run.part == "filter")
        if start != run:
            values["student"]["weights"] = str((self.folder / start.name / "student" / "float" / WEIGHTS).resolve())
            values["student"].pop("float_train")
        return bind(apply_overrides(values, [f"name={run.name}", f"seed={run.seed}", *self.args.overrides]))

    def _first(self, run: Run, *, any_method: bool) -> Run:
        """Return the first run of the same domain and seed, whose teacher or float student this one uses."""
        return next(
            one for one in self.runs
            if (one.part, one.unseen, one.seed) == (run.part, run.unseen, run.seed)
            and (any_method or one.method == run.method)
        )  # fmt: skip

    def row(self, run: Run) -> dict[str, Any]:
        """Return the outcome of a run: accuracies in the unseen domain."""
        row = {"part": run.part, "method": run.method, "unseen": run.unseen, "bits": run.bits, "seed": run.seed}
        if why := noted_failure(self.folder, run.name):
            return {**row, "failed": why}
        found = {
            name: accuracy
            for name, place in (
                ("accuracy", "student"), ("float", "student/float"), ("teacher", "teacher"),
                ("taught_teacher", "student/teacher"),
            )
            if (accuracy := accuracy_in(self.folder / run.name / place)) is not None
        }  # fmt: skip
        return {**row, **found} if "accuracy" in found else {**row, "failed": NOT_RUN}

    def write(self) -> None:
        """Write the results so far."""
        rows = [self.row(run) for run in self.runs]
        record = {
            "what": "digits, 359 test images in a domain without labels in training; students scored once after their "
            "last epoch; fractions",
            "seeds": self.args.seeds,
            "overrides": public(self.args.overrides),
            "environment": environment_of(self.folder / run.name for run in self.runs),
            "rows": rows,
        }
        self.args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        self.args.out.with_suffix(".md").write_text(markdown(rows))


def accuracy_in(folder: Path) -> float | None:
    """Return the test accuracy of a role, or None if it has none yet."""
    path = folder / "result.json"
    return float(json.loads(path.read_text())["test_accuracy"]) if path.is_file() else None


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown tables."""
    parts = {part: [row for row in rows if row["part"] == part] for part in PARTS}
    texts = []
    if parts["filter"]:
        texts.append("\n".join(filter_table(parts["filter"])))
    if parts["adaptation"]:
        texts.append("\n".join(adaptation_table(parts["adaptation"])))
    return "\n\n".join(texts) + "\n"


def filter_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per domain: each method over the seeds, and the mean difference to plain soft targets."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    good = {(row["unseen"], row["method"], row["seed"]): row["accuracy"] for row in rows if "failed" not in row}
    lines = [f"| unseen domain | {' | '.join(methods)} | runs that failed |", f"|---|{'---|' * len(methods)}---|"]
    domains = list(dict.fromkeys(row["unseen"] for row in rows))
    for unseen in domains:
        cells = [shown([value for key, value in good.items() if key[:2] == (unseen, method)]) for method in methods]
        failed = sum("failed" in row for row in rows if row["unseen"] == unseen)
        lines.append(f"| {unseen} | {' | '.join(cells)} | {failed} |")
    means = [shown(means_of_seeds(method, domains, good)) for method in methods]
    return [*lines, f"| mean of the domains | {' | '.join(means)} | |", *differences(methods, good)]


def means_of_seeds(method: str, domains: Sequence[str], good: dict[tuple[str, str, int], float]) -> list[float]:
    """Return a method's mean over the domains, for each seed that has all of them."""
    seeds = sorted({seed for _, name, seed in good if name == method})
    whole = [seed for seed in seeds if all((unseen, method, seed) in good for unseen in domains)]
    return [statistics.mean(good[unseen, method, seed] for unseen in domains) for seed in whole]


def differences(methods: Sequence[str], good: dict[tuple[str, str, int], float]) -> list[str]:
    """Return the line of paired differences to plain soft targets, in points, with their standard error."""
    cells = []
    for method in methods:
        pairs = [
            100 * (value - good[unseen, PLAIN, seed])
            for (unseen, name, seed), value in good.items()
            if name == method and (unseen, PLAIN, seed) in good
        ]
        if method == PLAIN or len(pairs) < 2:
            cells.append("")
            continue
        error = statistics.stdev(pairs) / len(pairs) ** 0.5
        cells.append(f"{statistics.mean(pairs):+.2f} ± {error:.2f} points")
    return [f"| difference, same seed and domain (± standard error) | {' | '.join(cells)} | |"]


def adaptation_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per method: teacher, float and low-bit students over the seeds."""
    lines = [
        "| method | teacher before | teacher after | float student | W4A4 | W2A2 | runs that failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        of_bits = {bits: [row for row in mine if row["bits"] == bits] for bits in BITS}
        cells = [
            shown([row["teacher"] for row in of_bits[BITS[0]] if "teacher" in row]),
            shown([row["taught_teacher"] for row in of_bits[BITS[0]] if "taught_teacher" in row]),
            shown([row["float"] for row in mine if "float" in row]),
            *(shown([row["accuracy"] for row in of_bits[bits] if "accuracy" in row]) for bits in BITS),
            str(sum("failed" in row for row in mine)),
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def shown(values: Sequence[float]) -> str:
    """Return mean and standard deviation in percent and the count, or a dash without values."""
    found = spread(values)
    return f"{100 * found['mean']:.1f} ± {100 * found['stdev']:.1f} % ({found['seeds']})" if values else "–"


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/domains"))
    parser.add_argument("--collect", action="store_true", help="only collect existing runs")
    parser.add_argument(
        "--out", type=output_file(), default=ROOT / "benchmarks" / "results" / "domains", help="without suffix"
    )
    args = parser.parse_args()
    if args.collect:
        require_runs(parser, args.runs_dir)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    comparison = Comparison(args)
    if args.collect:
        comparison.write()
    else:
        comparison.run()


if __name__ == "__main__":
    main()
