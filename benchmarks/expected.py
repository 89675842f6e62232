"""Runs the configs of the methods with their own seed, and records the accuracies that their comments promise.

    python benchmarks/expected.py                      # every config in configs/digits/methods; resumes
    python benchmarks/expected.py configs/digits/methods/plain.yaml --out plain.json

Each run goes through `qkd` up to `distill`: last epoch, the 359 test images read once, one seed. With so few images,
one image is 0.28 points; another processor or PyTorch can change which of them are right. A test compares the line
`# Expected:` of each config with the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from stage_runs import environment_of, run_stages

from qkd.cli.options.values import output_file
from qkd.config.binding import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "digits" / "methods"
OUT = ROOT / "benchmarks" / "results" / "expected_methods.json"


def figures_of(run: Path) -> dict[str, float]:
    """Return the test accuracies of a run by name, in percent with one digit, as reports print them."""
    found: dict[str, float] = {}
    for file in sorted(run.glob("**/result.json")):
        role, result = str(file.parent.relative_to(run)), json.loads(file.read_text())
        for name, part in ((role, result), *_parts(role, result)):
            if "test_accuracy" in part:
                found[name] = round(100 * part["test_accuracy"], 1)
    return found


def _parts(role: str, result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return what else a result scores: an ensemble, its members, and peers."""
    members = [(f"{role}/member_{index}", one) for index, one in enumerate(result.get("members", []))]
    peers = [(f"{role}/{one['name']}", one) for one in result.get("peers", [])]
    return [(f"{role}/ensemble", result.get("ensemble", {})), *members, *peers]


def main() -> None:
    """Run what is missing and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, help="default: all of configs/digits/methods")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/expected"))
    parser.add_argument("--out", type=output_file(".json"), default=OUT)
    args = parser.parse_args()
    configs = [path.resolve() for path in args.configs] or sorted(CONFIGS.glob("*.yaml"))
    if missing := [str(path) for path in configs if not path.is_file()]:
        parser.error(f"no such config: {', '.join(missing)}")
    if not args.out.parent.is_dir():
        parser.error(f"--out: {args.out.parent} is not a folder")
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = {}
    runs = {path: args.runs_dir / load_config(path).name for path in configs}
    for path, run in runs.items():
        why = run_stages(str(path), run.name, [], args.runs_dir, until="distill")
        row = {"failed": why} if why else figures_of(run)
        key = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        rows[key] = row
        print(key, row, flush=True)
    record = {
        "what": "test accuracies in percent, last epoch, the seed of each config",
        "command": "python benchmarks/expected.py",
        "environment": environment_of(runs.values()),
        "configs": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
