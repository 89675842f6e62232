"""Trains configs over several seeds and writes the table of last-epoch test accuracies, with spread and parity.

    python benchmarks/accuracy.py configs/digits/w4a4.yaml configs/digits/w2a2.yaml --seeds 0 1 2 \
        --json benchmarks/results/accuracy_digits.json

For every seed the first config trains the teacher, and the others distill from the same one (their own teacher section
is replaced by its weights). Each run goes through `qkd` up to the export, so every row includes the parity of its
student over the whole test set. A run that fails is listed in the table with its message. Extra `key.path=value` words
are passed on to every run.

A student whose export stage did not finish, or whose file failed parity, is not a result: its row gives the reason
instead of figures. `--judge FILE` applies that to a table from an earlier version.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stage_runs import NOT_RUN, environment_of, public, require_runs, run_stages, spread

from qkd.cli.options.values import output_file
from qkd.config.binding import load_config
from qkd.roles.stored import stored_config
from qkd.run.identity import different_settings


def run_one(config: str, seed: int, folder: Path, overrides: list[str], teacher: Path | None) -> dict[str, Any]:
    """Run the stages of one config with one seed and return its row."""
    name = name_of(config, seed)
    words = [f"seed={seed}", *overrides]
    if teacher is not None:
        words += [f"teacher.weights={teacher}", "teacher.train=null"]
    started = time.time()
    if why := run_stages(config, name, words, folder, until="export"):
        return {"config": config, "seed": seed, "failed": why}
    return {"config": config, "seed": seed, "seconds": round(time.time() - started), **_read(folder / name)}


def _read(run: Path) -> dict[str, Any]:
    teacher = json.loads((run / "teacher" / "result.json").read_text())
    student = json.loads((run / "student" / "result.json").read_text())
    parity = json.loads((run / "export" / "parity.json").read_text())
    if why := refusal(run, parity):
        return {"failed": why}
    return {
        "teacher_accuracy": teacher["test_accuracy"],
        "student_accuracy": student["test_accuracy"],
        "weight_bits": student["weight_bits"],
        "act_bits": student["act_bits"],
        "images": parity["images"],
        "passed": parity["passed"],
        "parity_off": parity["off"]["top1_agreement"],
        "parity_on": parity["on"]["top1_agreement"],
        "integers_differing_off": sum(layer["differing"] for layer in parity["layers"]),
        "student_bytes": (run / "export" / "student.onnx").stat().st_size,
        "teacher_bytes": (run / "export" / "teacher.onnx").stat().st_size,
    }


def refusal(run: Path, parity: dict[str, Any]) -> str:
    """Return why the run's student is not a result, or an empty string.

    The stage that refuses a file keeps it and the comparison, so their existence says nothing.

    Args:
        run: The run folder.
        parity: Content of its ``parity.json``.
    """
    if not parity.get("passed"):
        faults = parity.get("faults") or [f"another class on {parity['off']['differing']} images, optimizations off"]
        return f"export: parity refused the file: {'; '.join(faults)}"
    return "" if (run / "manifests" / "export.json").exists() else "export: not complete"


def judge(path: Path) -> None:
    """Rewrite a table so that students that failed parity are excluded.

    Tables from earlier versions do not say whether a run passed, so their record of the comparison decides: the stage
    has always refused a student whose class differed on any image.
    """
    record = json.loads(path.read_text())
    rows = [_judged(row) for row in record["rows"]]
    record |= {"summary": summarize(rows, record["configs"]), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")


def _judged(row: dict[str, Any]) -> dict[str, Any]:
    is_good = row.get("passed", row.get("parity_off") == 1.0 and row.get("integers_differing_off") == 0)
    if "failed" in row or is_good:
        return row
    return {
        "config": row["config"],
        "seed": row["seed"],
        "failed": f"export: parity refused the file: {_fault(row)}",
        "refused": row,
    }


def _fault(row: dict[str, Any]) -> str:
    if differing := round((1 - row["parity_off"]) * row["images"]):
        return f"another class on {differing} of {row['images']} images, optimizations off"
    if row["integers_differing_off"]:
        return f"{row['integers_differing_off']} codes differ, optimizations off"
    return "parity.json says why"


def collect(
    config: str, seed: int, folder: Path, overrides: Sequence[str] = (), *, has_own_teacher: bool = False
) -> dict[str, Any]:
    """Return the row of an existing run, without training; a failed row if it was trained with other settings.

    Args:
        config: Path of the config.
        seed: The run's.
        folder: Folder of the run folders.
        overrides: ``key.path=value``, as when it was trained.
        has_own_teacher: Whether it trained its teacher; if not, settings of the teacher are not compared.
    """
    run, row = folder / name_of(config, seed), {"config": config, "seed": seed}
    try:
        found = _read(run)
    except FileNotFoundError:
        return {**row, "failed": NOT_RUN}
    changed = different_settings(stored_config(run), load_config(config, [f"seed={seed}", *overrides]))
    others = [
        f"{key} was {was}, now {now}"
        for key, (was, now) in changed.items()
        if has_own_teacher or not key.startswith("teacher.")
    ]
    return {**row, "failed": f"trained with other settings: {'; '.join(others)}"} if others else {**row, **found}


def name_of(config: str, seed: int) -> str:
    """Return the name of a config's run folder."""
    return f"{Path(config).parent.name}-{Path(config).stem}-seed{seed}"


def run_seed(args: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Run all configs with one seed; the others use the first one's teacher."""
    rows: list[dict[str, Any]] = []
    teacher = Path(args.teachers.format(seed=seed)).resolve() if args.teachers else None
    if args.collect:
        return [
            collect(config, seed, args.runs_dir, args.overrides, has_own_teacher=teacher is None and place == 0)
            for place, config in enumerate(args.configs)
        ]
    for config in args.configs:
        rows.append(run_one(config, seed, args.runs_dir, args.overrides, teacher))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        first = args.runs_dir / name_of(config, seed)
        if teacher is None and "failed" not in rows[-1]:
            teacher = (first / "teacher" / "weights.safetensors").resolve()
    return rows


def summarize(rows: list[dict[str, Any]], configs: list[str]) -> dict[str, Any]:
    """Return mean and standard deviation per config, and of the teachers."""
    good = [row for row in rows if "failed" not in row]
    table = {config: spread([r["student_accuracy"] for r in good if r["config"] == config]) for config in configs}
    teachers = {row["seed"]: row["teacher_accuracy"] for row in good}  # one per seed, shared by the configs
    return {"teacher": spread(list(teachers.values())), **table}


def main() -> None:
    """Parse the command line, train, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="config files and key.path=value overrides")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--teachers", help="trained teachers to use for all configs, e.g. runs/t-seed{seed}/teacher/weights.safetensors"
    )
    parser.add_argument("--jobs", type=int, default=1, help="seeds trained in parallel")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--collect", action="store_true", help="only collect existing runs; do not train")
    parser.add_argument("--judge", type=Path, metavar="FILE", help="only exclude what failed parity from this table")
    parser.add_argument("--json", type=output_file(".json"))
    args = parser.parse_intermixed_args()
    if args.judge:
        judge(args.judge)
        return
    args.configs = [word for word in args.words if "=" not in word]
    args.overrides = [word for word in args.words if "=" in word]
    if not args.configs:
        parser.error("name the configs to train")
    if missing := [config for config in args.configs if not Path(config).is_file()]:
        parser.error(f"no such config: {', '.join(missing)}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: {args.json.parent} is not a folder")
    if args.collect:
        require_runs(parser, args.runs_dir)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for part in pool.map(lambda seed: run_seed(args, seed), args.seeds) for row in part]
    summary = summarize(rows, args.configs)
    for name, row in summary.items():
        print(f"{name:45s}", row)
    if args.json:
        record = {"what": "last-epoch test accuracy", "configs": args.configs, "overrides": public(args.overrides)}
        runs = [args.runs_dir / name_of(config, seed) for config in args.configs for seed in args.seeds]
        record |= {"environment": environment_of(runs), "summary": summary, "rows": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
