"""`qkd diagnose`: what a teacher's outputs reveal, and which known failures of distillation they show."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, load, new_progress, print_result
from qkd.cli.options.values import finite, output_file, positive


def add(commands: Any) -> None:
    """Declare the command."""
    text = "analyze what a teacher's soft targets say about its training images, and which known problems they reveal"
    look = add_command(commands, "diagnose", diagnose, text, has_runs=True)
    look.add_argument("config", metavar="CONFIG|RUN", help="a run (folder or name) with a teacher, or its config")
    look.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="with a CONFIG, e.g. name=other-run"
    )
    look.add_argument("--limit", type=positive, metavar="N", help="at most N training images, stratified (all)")
    look.add_argument("--temperature", type=finite, metavar="T", help="temperature of distillation (the config's)")
    look.add_argument(
        "--out", type=output_file(".svg", ".png"), metavar="FILE.svg|FILE.png", help="draw the result to FILE"
    )


def diagnose(args: argparse.Namespace) -> int:
    """Measure a teacher on its training images, print tables and findings, and draw them if requested."""
    from qkd.analysis.run_diagnosis import diagnose_target

    options = {"limit": args.limit, "temperature": args.temperature, "out": args.out, "progress": new_progress()}
    where = {"runs_dir": args.runs_dir, "overrides": args.overrides, "load": lambda: load(args)}
    return print_result(args, diagnose_target(args.config, **where, **options))
