"""Compares federated training strategies: accuracy by round and by bytes, float and W4A4, and a low-bit upload.

    python benchmarks/federated.py data.name=npz data.path=fashion-mnist --seeds 0 1 2
    python benchmarks/federated.py federated.rounds=4 --config configs/digits/federated/fedgen.yaml --seeds 0 \
        --out /tmp/federated

Every run is ``qkd federate`` with the same config, partition of the images, clients per round and initial weights; only
strategy and precision differ. A row ``fedavg, codes`` sends codes and scales instead of shadow weights. Test images are
scored every few rounds, but no round is chosen by them: the result is the last one. (The config's learning rate,
momentum, clipping and latent_weight were chosen by them, in short float runs with seed 0.) Complete runs are not
repeated, others resume. Extra ``key.path=value`` words are passed on to every run. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage_runs import environment_of, public, require_runs, run_command, spread

from qkd.cli.options.values import output_file

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/fashion-mnist/federated.yaml"
STRATEGIES = ("fedavg", "fedprox", "feddistill", "fedgen")
BUDGET_MB = 33  # of the last column: bytes of all messages so far, in both directions
OTHERS = ["federated.latent_weight=10.0"]  # back to the default: strategies reject settings that they do not read
FLOAT, LOW_BIT, CODES = "float", "W4A4", "W4A4, codes"
KINDS = {
    FLOAT: ["federated.precision=float"],
    LOW_BIT: ["federated.precision=low_bit"],
    CODES: ["federated.precision=low_bit", "federated.upload=codes"],
}


def rows_of(strategies: Sequence[str]) -> list[tuple[str, str]]:
    """Return strategy and kind of each row; the low-bit upload is measured with the first strategy."""
    pairs = [(strategy, kind) for kind in (FLOAT, LOW_BIT) for strategy in strategies]
    return [*pairs, (strategies[0], CODES)]


def run_name(strategy: str, kind: str, seed: int) -> str:
    """Return the name of a run folder."""
    return f"{strategy}-{kind.lower().replace(', ', '-')}-seed{seed}"


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded rounds of a run; empty if it is not complete."""
    file = folder / "federated" / "rounds.json"
    return list(json.loads(file.read_text())["rounds"]) if file.is_file() else []


def row(strategy: str, kind: str, folders: Sequence[Path], failed: dict[str, str]) -> dict[str, Any]:
    """Return the outcome of the runs of all seeds."""
    runs = [rounds for folder in folders if (rounds := rounds_of(folder))]
    results = [json.loads((folder / "student" / "result.json").read_text()) for folder in folders if rounds_of(folder)]
    scored = [[one for one in rounds if "test_accuracy" in one] for rounds in runs]
    return {
        "strategy": strategy,
        "kind": kind,
        "final": spread([result["test_accuracy"] for result in results]),
        "curve": [curve_point(points) for points in zip(*scored, strict=True)],
        "failed": failed,
    }


def curve_point(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a round of all seeds: accuracy, and bytes so far (the same for all seeds)."""
    first = points[0]
    return {
        "round": first["round"],
        "bytes_down": first["total_bytes_down"],
        "bytes_up": first["total_bytes_up"],
        "test_accuracy": [round(point["test_accuracy"], 4) for point in points],
    }


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def at(points: Sequence[dict[str, Any]]) -> str:
    """Return the accuracy at a scored round, if there is one."""
    return "".join(f"{100 * mean(point['test_accuracy']):.1f} (round {point['round']})" for point in points) or "-"


def final_text(final: dict[str, Any]) -> str:
    """Return the accuracy after all rounds, with its deviation if there is more than one seed."""
    deviation = f" +- {100 * final['stdev']:.1f}" if final["seeds"] > 1 else ""
    return f"{100 * final['mean']:.1f}{deviation} ({final['seeds']})"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as Markdown: test accuracy in percent by round, and within a budget of bytes."""
    head = ["strategy", "precision", "half of the rounds", "all rounds (seeds)", "up, MB", "down, MB"]
    head.append(f"within {BUDGET_MB} MB, both ways")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for one in rows:
        curve = one["curve"]
        cells = ["-"] * (len(head) - 2)
        if curve:
            last = curve[-1]
            half = [point for point in curve if 2 * point["round"] <= last["round"]][-1:]
            paid = [point for point in curve if point["bytes_up"] + point["bytes_down"] <= BUDGET_MB * 1e6][-1:]
            sizes = [f"{last[key] / 1e6:.1f}" for key in ("bytes_up", "bytes_down")]
            cells = [at(half), final_text(one["final"]), *sizes, at(paid)]
        lines.append("| " + " | ".join([one["strategy"], one["kind"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def write(args: argparse.Namespace, failed: dict[str, str]) -> None:
    """Write the results so far."""
    rows, runs = [], []
    for strategy, kind in rows_of(args.strategies):
        names = [run_name(strategy, kind, seed) for seed in args.seeds]
        own = {name: failed[name] for name in names if name in failed}
        runs.append([args.runs_dir / name for name in names])
        rows.append(row(strategy, kind, runs[-1], own))
    facts = {
        "what": "final: student after the last round, on all test images; curves: fractions, one value per seed",
        "config": args.config,
        "seeds": args.seeds,
        "overrides": public(args.overrides),
        "environment": environment_of(folder for folders in runs for folder in folders),
    }
    args.out.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(table(rows))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/federated"))
    parser.add_argument("--out", type=output_file(), default=ROOT / "benchmarks" / "results" / "federated")
    parser.add_argument("--write-only", action="store_true", help="only write the table of existing runs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[])
    args, rest = parser.parse_known_args(argv)
    args.overrides = [*args.overrides, *rest]
    if args.write_only:
        require_runs(parser, args.runs_dir, "--write-only")
    return args


def main() -> None:
    """Run everything that is not complete, seed by seed; write after each run."""
    args = parse()
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    if args.write_only:
        write(args, failed)
        return
    for seed in args.seeds:
        for strategy, kind in rows_of(args.strategies):
            name = run_name(strategy, kind, seed)
            words = [f"name={name}", f"seed={seed}", f"federated.strategy={strategy}", *KINDS[kind]]
            words += [*([] if strategy == "fedgen" else OTHERS), *args.overrides]
            if why := run_command(["federate", args.config, *words], name, args.runs_dir):
                failed[name] = why
            write(args, failed)


if __name__ == "__main__":
    main()
