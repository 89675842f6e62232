"""`qkd run`: every stage of an experiment, resuming where it stopped."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qkd.cli.options.command import (
    CONFIG_OR_RUN,
    STAGE_NAMES,
    add_command,
    load,
    meant,
    new_progress,
    print_result,
    run_stages_of,
)
from qkd.cli.options.devices import add_devices, on_devices
from qkd.engines.membership import is_first
from qkd.failures import DONE
from qkd.run.target import require_place

if TYPE_CHECKING:
    from qkd.config import RunConfig

CHANGES = (
    "In an existing run, the settings of export, bench, device and threads may change; only the stages that depend on "
    "them run again. Another student of the same teacher is another run: `qkd run CONFIG name=second "
    "teacher.run=runs/first student.quant.weight_bits=4` copies the teacher of the first instead of training one. "
    "In a data-free run, other bit widths (`student.quant`) need no name: the second student becomes the run "
    "`NAME-w4a4` next to the first, and the source of the images is copied along with the teacher."
)


def add(commands: Any) -> None:
    """Declare the command."""
    text = "run every stage; resume where it stopped"
    parser = add_command(commands, "run", run, text, config=CONFIG_OR_RUN, has_runs=True)
    parser.add_argument(
        "--dry-run", action="store_true", help="try every step on two batches; without measuring or keeping anything"
    )
    add_devices(parser)
    parser.description = f"Run every stage; resume where it stopped. {CHANGES}"
    parser.add_argument("--until", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="the last stage to run")


def run(args: argparse.Namespace) -> int:
    """Run every stage (or up to one), then print the closing table."""
    config = load(args)
    from qkd.pipeline.running import refuse_clients

    refuse_clients(config)
    require_place(args.runs_dir, config.name)
    if args.dry_run:
        return _run(args, config)
    config = meant(args, config)
    return on_devices(args, config, lambda: _run(args, config))


def _run(args: argparse.Namespace, config: RunConfig) -> int:
    from qkd.engines.engine import current

    stages = STAGE_NAMES[: STAGE_NAMES.index(args.until) + 1]
    if args.dry_run:
        from qkd.pipeline.dryrun import dry_run

        load(args, with_files=True)
        return print_result(args, dry_run(config, new_progress())) if is_first() else DONE
    from qkd.pipeline.running import look_ahead

    def check_files() -> None:
        load(args, with_files=True)

    current().first(lambda: look_ahead(config, args.runs_dir / config.name, stages, check_files, new_progress()))
    return run_stages_of(config, stages, args)
