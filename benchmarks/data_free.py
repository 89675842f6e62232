"""Compares data-free methods on one pair of nets: float, W4A4 and W2A2 students beside noise and real images.

    python benchmarks/data_free.py --methods real noise rdskd dafl --seeds 0
    python benchmarks/data_free.py --methods noise gdfq --seeds 0 --runs-dir runs/statistics \
        --out benchmarks/results/data_free_statistics teacher.net=resnet8 student.net=resnet8 student.bn=frozen_teacher

Every method is a config of ``configs/digits/data-free``; methods of one pair of nets share the teacher of a seed. The
first run of a method makes what the images come from and the float student; the other width takes both over, so that
one generator serves all widths. ``real`` is the same student with soft targets on real training images, for as many
batches (its epochs are shorter, so it has more of them). Students are scored once, on the whole test set, after their
last epoch. Complete runs are not run again; a run that fails stays in the table with its message. Extra
``key.path=value`` words are passed on to every run. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_runs import environment, public, run_stages, spread

from qkd.files.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "digits" / "data-free"
REAL = "real"  # the row with real images
BITS = (2, 4)  # the first makes the images
REAL_EPOCHS = (54, 27)  # of 22 batches: as many as 12 and 6 epochs of 100
REAL_CONFIG = "soft_target on real images"


class Comparison:
    """The runs of the comparison, and what became of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, args.runs_dir
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        """Run everything, a seed after the other."""
        for seed in self.args.seeds:
            for method in self.args.methods:
                for bits in BITS:
                    self._run(method, bits, seed)
                    self.write()

    def _run(self, method: str, bits: int, seed: int) -> None:
        name = run_name(method, bits, seed)
        why = run_stages(str(self.config(method)), name, self.words(method, bits, seed), self.folder, until="distill")
        if why:
            self.failed[name] = why

    def config(self, method: str) -> Path:
        """Return the config of a method."""
        return CONFIGS / f"{'noise' if method == REAL else method}.yaml"

    def words(self, method: str, bits: int, seed: int) -> list[str]:
        """Return the overrides of a run."""
        words = [f"seed={seed}", f"student.quant.weight_bits={bits}", f"student.quant.act_bits={bits}"]
        if method == REAL:
            words += ["student.data_free=null", f"student.train.epochs={REAL_EPOCHS[1]}"]
            words += [f"student.float_train.epochs={REAL_EPOCHS[0]}"] if bits == BITS[0] else []
        first = self.folder / run_name(method, BITS[0], seed)
        if bits != BITS[0]:
            start = first / "student" / "float" / "weights.safetensors"
            words.append(f"teacher.run={first}")
            words += [f"student.weights={start}", "student.float_train=null"] if start.is_file() else []
        elif (teacher := self.teacher(method, seed)) is not None:
            words.append(f"teacher.run={teacher}")
        return [*words, *self.args.overrides]

    def teacher(self, method: str, seed: int) -> Path | None:
        """Return a run of another method whose teacher is this one's, too; None where there is none yet."""
        own = parse_yaml(self.config(method).read_text())["teacher"]
        for other in self.args.methods:
            path = self.folder / run_name(other, BITS[0], seed)
            is_same = parse_yaml(self.config(other).read_text())["teacher"] == own
            if other != method and is_same and (path / "manifests" / "teacher.json").is_file():
                return path
        return None

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per method."""
        return [self._row(method) for method in self.args.methods]

    def _row(self, method: str) -> dict[str, Any]:
        runs = {bits: [self.folder / run_name(method, bits, seed) for seed in self.args.seeds] for bits in BITS}
        ran = [parse_yaml(file.read_text()) for run in runs[BITS[0]] if (file := run / "config.yaml").is_file()]
        config = ran[0] if ran else parse_yaml(self.config(method).read_text())
        made = [found for path in runs[BITS[0]] if (found := read(path / "generator" / "result.json"))]
        return {
            "method": method,
            "config": REAL_CONFIG if method == REAL else str(self.config(method).relative_to(ROOT)),
            "teacher": config["teacher"]["net"],
            "student": config["student"]["net"] or config["teacher"]["net"],
            "teacher_accuracy": spread(accuracies(runs[BITS[0]], "teacher")),
            "float": spread(accuracies(runs[BITS[0]], "student/float")),
            **{f"w{bits}a{bits}": spread(accuracies(runs[bits], "student")) for bits in BITS},
            "made": [
                {key: one[key] for key in ("steps", "seconds", "histogram_entropy", "mean_confidence")} for one in made
            ],
            "one_generator": same_files(*(runs[bits] for bits in BITS)) if made else None,
            "failed": {name: why for name, why in self.failed.items() if name.startswith(f"{method}-")},
        }

    def write(self) -> None:
        """Write what there is so far."""
        facts = {
            "what": "digits, 359 test images; students scored once after their last epoch; fractions",
            "seeds": self.args.seeds,
            "overrides": public(self.args.overrides),
            "environment": environment(),
        }
        rows = self.rows()
        self.args.out.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
        self.args.out.with_suffix(".md").write_text(table(rows))


def run_name(method: str, bits: int, seed: int) -> str:
    """Return the name of a run folder."""
    return f"{method}-w{bits}a{bits}-seed{seed}"


def read(path: Path) -> dict[str, Any]:
    """Return a result; empty where there is none."""
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def same_files(first: Sequence[Path], second: Sequence[Path]) -> bool | None:
    """Return whether what makes the images has the same hashes in runs of both widths; None where one has none yet."""
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
    """Return the rows as a table in Markdown."""
    lines = ["| method | teacher | float student | W4A4 | W2A2 | generator steps |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [_percent(row[key]) for key in ("teacher_accuracy", "float", "w4a4", "w2a2")]
        steps = f"{row['made'][0]['steps']:,}" if row["made"] else "-"
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {steps} |")
    return "\n".join(lines) + "\n"


def _percent(found: dict[str, Any]) -> str:
    if not found["seeds"]:
        return "-"
    more = f" ± {100 * found['stdev']:.1f}" if found["seeds"] > 1 else ""
    return f"{100 * found['mean']:.1f}{more} %"


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser.add_argument("--methods", nargs="+", choices=[REAL, *known], default=[REAL, *known])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=ROOT / "runs" / "data-free")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "data_free")
    parser.add_argument("--write-only", action="store_true", help="run nothing: a table of what is there")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    comparison = Comparison(args)
    if args.write_only:
        comparison.write()
    else:
        comparison.run()
    print(table(comparison.rows()))
    for name, why in comparison.failed.items():
        print(f"failed: {name}: {why}")
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
