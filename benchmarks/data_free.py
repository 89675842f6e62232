"""Compares data-free methods on one pair of nets: float, W4A4 and W2A2 students next to noise and real images.

    python benchmarks/data_free.py --methods real noise rdskd dafl
    python benchmarks/data_free.py --methods real noise gdfq dfq deep-inversion --runs-dir runs/data-free-resnet8 \
        --out benchmarks/results/data_free_resnet8 data.image_size=null teacher.net=resnet8 teacher.train.epochs=12 \
        teacher.train.lr=0.1 teacher.agent.crop_padding=1 student.net=resnet8 student.bn=frozen_teacher \
        student.agent.policy=none student.train.epochs=6
    python benchmarks/data_free.py --configs configs/fashion-mnist/data-free --runs-dir runs/data-free-fashion
    python benchmarks/data_free.py --configs configs/fashion-mnist/data-free --runs-dir runs/data-free-fashion-resnet8 \
        --reuse runs/data-free-fashion --out benchmarks/results/data_free_fashion-mnist_resnet8 \
        student.net=resnet8 student.bn=train

Every method is a config in one folder; methods with the same pair of nets share the teacher of a seed. The first run of
a method trains the image source and the float student; the other width reuses both, so that one generator serves all
widths. ``real`` is the student of ``noise`` with soft targets on real training images, for the same number of batches
(its epochs have another length, so their number differs). Students are scored once, on the whole test set, after their
last epoch. Complete runs are not repeated; a failed run is listed in the table with its message until it is run again.
Extra ``key.path=value`` words are passed on to every run. With --reuse, teachers and image sources come from the runs
of an earlier comparison, as in the last command, whose students have another network.

While it runs, partial results are in RUNS_DIR/table.json and table.md, so that the checkout stays clean and each run
records a commit without changes. At the end, and with --write-only, it writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stage_runs import environment_of, public, run_stages, spread

from qkd.cli.options.values import output_file
from qkd.config import RunConfig
from qkd.config.binding import load_config
from qkd.data import load_splits
from qkd.files.yaml_text import parse_yaml
from qkd.image_size import size_text

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "digits" / "data-free"
REAL = "real"  # the row with real images
BITS = (2, 4)  # the first makes the images
REAL_CONFIG = "soft_target on real images"


class Comparison:
    """The runs of the comparison and their outcomes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.runs_dir

    def run(self) -> None:
        """Run everything, one seed after another."""
        for seed in self.args.seeds:
            for method in self.args.methods:
                for bits in BITS:
                    self._run(method, bits, seed)
                    self.write(self.folder / "table")

    def _run(self, method: str, bits: int, seed: int) -> None:
        name = run_name(method, bits, seed)
        why = run_stages(str(self.config(method)), name, self.words(method, bits, seed), self.folder, until="distill")
        failure = self.folder / f"{name}.failed"
        failure.unlink(missing_ok=True)
        if why:
            failure.write_text(why + "\n")

    def failed(self) -> dict[str, str]:
        """Return the message of each run of the table that failed, by its name."""
        files = {name: self.folder / f"{name}.failed" for name in self.names()}
        return {name: file.read_text().strip() for name, file in files.items() if file.is_file()}

    @cached_property
    def settings(self) -> RunConfig:
        """Return the config of the noise row with the overrides, for its data set and training lengths."""
        return load_config(self.config("noise"), self.args.overrides)

    @cached_property
    def real_batches(self) -> int:
        """Return the number of batches in an epoch of real images."""
        data = self.settings.data
        return len(load_splits(data, seed=0).train) // data.batch_size

    def real_epochs(self, epochs: int) -> int:
        """Return the number of epochs of real images with as many batches as ``epochs`` of generated ones."""
        made = self.settings.student.data_free.images_per_epoch // self.settings.data.batch_size
        return max(1, round(epochs * made / self.real_batches))

    def config(self, method: str) -> Path:
        """Return the config of a method."""
        return self.args.configs / f"{'noise' if method == REAL else method}.yaml"

    def words(self, method: str, bits: int, seed: int) -> list[str]:
        """Return the overrides of a run."""
        words = [f"seed={seed}", f"student.quant.weight_bits={bits}", f"student.quant.act_bits={bits}"]
        if method == REAL:
            student = self.settings.student
            words += ["student.data_free=null", f"student.train.epochs={self.real_epochs(student.train.epochs)}"]
            if bits == BITS[0] and student.float_train is not None:
                words.append(f"student.float_train.epochs={self.real_epochs(student.float_train.epochs)}")
        first = self.folder / run_name(method, BITS[0], seed)
        if bits != BITS[0]:
            start = first / "student" / "float" / "weights.safetensors"
            words.append(f"teacher.run={first}")
            without = ["student.float_train=null", "student.float_agent=null"]  # it is trained
            words += [f"student.weights={start}", *without] if start.is_file() else []
        elif (teacher := self.teacher(method, seed)) is not None:
            words.append(f"teacher.run={teacher}")
        return [*self.args.overrides, *words]  # lengths of the real row follow from the overrides

    def teacher(self, method: str, seed: int) -> Path | None:
        """Return a run that has this one's teacher; None if it trains its own."""
        begun = self.folder / run_name(method, BITS[0], seed) / "config.yaml"
        if begun.is_file():  # a resumed run keeps the teacher it started with
            found = parse_yaml(begun.read_text())["teacher"].get("run")
            return Path(found) if found else None
        if self.args.reuse is not None:
            return self.args.reuse / run_name(method, BITS[0], seed)  # has the method's image source, too
        own = load_config(self.config(method), self.args.overrides).teacher
        for other in self.args.methods:
            path = self.folder / run_name(other, BITS[0], seed)
            is_same = load_config(self.config(other), self.args.overrides).teacher == own
            if other != method and is_same and (path / "manifests" / "teacher.json").is_file():
                return path
        return None

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per method."""
        failed = self.failed()
        return [self._row(method, failed) for method in self.args.methods]

    def _row(self, method: str, failed: dict[str, str]) -> dict[str, Any]:
        runs = {bits: [self.folder / run_name(method, bits, seed) for seed in self.args.seeds] for bits in BITS}
        ran = [parse_yaml(file.read_text()) for run in runs[BITS[0]] if (file := run / "config.yaml").is_file()]
        config = ran[0] if ran else parse_yaml(self.config(method).read_text())
        made = [found for path in runs[BITS[0]] if (found := read(path / "generator" / "result.json"))]
        return {
            "method": method,
            "config": REAL_CONFIG if method == REAL else os.path.relpath(self.config(method), ROOT),
            "teacher": config["teacher"]["net"],
            "student": config["student"].get("net") or config["teacher"]["net"],
            "teacher_accuracy": spread(accuracies(runs[BITS[0]], "teacher")),
            "float": spread(accuracies(runs[BITS[0]], "student/float")),
            **{f"w{bits}a{bits}": spread(accuracies(runs[bits], "student")) for bits in BITS},
            "made": [
                {key: one[key] for key in ("steps", "seconds", "histogram_entropy", "mean_confidence")} for one in made
            ],
            "one_generator": same_files(*(runs[bits] for bits in BITS)) if made else None,
            "wanted": len(self.args.seeds),
            "failed": {name: why for name, why in failed.items() if name.startswith(f"{method}-w")},
        }

    def write(self, out: Path) -> None:
        """Write the results so far."""
        facts = {
            "what": "students scored once, on all test images, after their last epoch; accuracies are fractions",
            "data": self.data_name(),
            "seeds": self.args.seeds,
            "overrides": public(self.args.overrides),
            "environment": environment_of(self.folder / name for name in self.names()),
        }
        rows = self.rows()
        out.with_name(f"{out.name}.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
        out.with_name(f"{out.name}.md").write_text(table(rows))

    def data_name(self) -> str:
        """Return the data set's name (for npz files, their folder's name), with the size that it is resized to."""
        data = self.settings.data
        size = "" if data.image_size is None else f"-{size_text(data.image_size)}"
        return f"{data.name if data.path is None else data.path.name}{size}"

    def names(self) -> list[str]:
        """Return the names of the runs of the table."""
        return [
            run_name(method, bits, seed) for method in self.args.methods for seed in self.args.seeds for bits in BITS
        ]


def run_name(method: str, bits: int, seed: int) -> str:
    """Return the name of a run folder."""
    return f"{method}-w{bits}a{bits}-seed{seed}"


def read(path: Path) -> dict[str, Any]:
    """Return a result, empty if there is none."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def same_files(first: Sequence[Path], second: Sequence[Path]) -> bool | None:
    """Return whether the image sources of both widths have the same hashes; None if one does not exist yet."""
    pairs = [
        [read(run / "manifests" / "generator.json").get("files") for run in pair]
        for pair in zip(first, second, strict=True)
    ]
    return None if any(None in pair for pair in pairs) else all(pair[0] == pair[1] for pair in pairs)


def accuracies(runs: Sequence[Path], folder: str) -> list[float]:
    """Return the test accuracies of a role, of the runs that have it."""
    found = [read(run / folder / "result.json") for run in runs]
    return [one["test_accuracy"] for one in found if one]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| method | teacher | float student | W4A4 | W2A2 | generator steps |", "|---|---|---|---|---|---|"]
    for row in rows:
        wanted = row.get("wanted", 1)
        cells = [_percent(row[key], wanted) for key in ("teacher_accuracy", "float", "w4a4", "w2a2")]
        steps = f"{row['made'][0]['steps']:,}" if row["made"] else "-"
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {steps} |")
    failures = [f"- failed: {name}: {why}" for row in rows for name, why in row["failed"].items()]
    return "\n".join([*lines, *([""] if failures else []), *failures]) + "\n"


def _percent(found: dict[str, Any], wanted: int) -> str:
    if not found["seeds"]:
        return "-"
    more = f" ± {100 * found['stdev']:.1f}" if found["seeds"] > 1 else ""
    some = f" ({found['seeds']} of {wanted} seeds)" if found["seeds"] < wanted else ""
    return f"{100 * found['mean']:.1f}{more} %{some}"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of configs, one per method")
    parser.add_argument("--methods", nargs="+", help="real, and configs by name (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs" / "data-free")
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="RUNS_DIR",
        help="an earlier comparison whose teachers and image sources are reused",
    )
    parser.add_argument("--out", type=output_file(), help="default: results/data_free_DATA next to this file")
    parser.add_argument("--write-only", action="store_true", help="only write the table of existing runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    args.configs = args.configs.resolve()
    known = [REAL, *sorted(path.stem for path in args.configs.glob("*.yaml"))]
    args.methods = args.methods or known
    if unknown := set(args.methods) - set(known):
        parser.error(
            f"--methods: no config for {', '.join(sorted(unknown))} in {args.configs}; known: {', '.join(known)}"
        )
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    comparison = Comparison(args)
    if not args.write_only:
        comparison.run()
    comparison.write(args.out or ROOT / "benchmarks" / "results" / f"data_free_{comparison.data_name()}")
    print(table(comparison.rows()))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
