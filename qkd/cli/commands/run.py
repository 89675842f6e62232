"""`qkd run`: every stage of an experiment, resuming where it stopped."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import (
    CONFIG_OR_RUN,
    STAGE_NAMES,
    add_command,
    load,
    new_progress,
    print_result,
    run_stages_of,
)

CHANGES = (
    "In a run that is there, settings of export and bench, device and threads may change: only the stages behind them "
    "run again. Another student of its teacher is another run: `qkd run CONFIG name=second teacher.run=runs/first "
    "student.quant.weight_bits=4` takes the teacher of the first and trains none."
)


def add(commands: Any) -> None:
    """Declare the command."""
    text = "every stage, resuming where it stopped"
    parser = add_command(commands, "run", run, text, config=CONFIG_OR_RUN, has_runs=True)
    parser.add_argument(
        "--dry-run", action="store_true", help="try every step on two batches; measures and keeps nothing"
    )
    parser.description = f"Every stage, resuming where it stopped. {CHANGES}"
    parser.add_argument("--until", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="the last stage to run")


def run(args: argparse.Namespace) -> int:
    """Run every stage (or up to one), then print the closing table."""
    config = load(args)
    stages, is_fresh = STAGE_NAMES[: STAGE_NAMES.index(args.until) + 1], not (args.runs_dir / config.name).exists()
    if args.dry_run or is_fresh:
        load(args, with_files=True)  # a fresh run needs all of them: say before training which are missing
        from qkd.pipeline.dryrun import check_distillation, dry_run

        if args.dry_run:
            return print_result(args, dry_run(config, new_progress()))
        if "distill" in stages:
            check_distillation(config, new_progress())
    return run_stages_of(config, stages, args)
