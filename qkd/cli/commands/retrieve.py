"""`qkd retrieve`: how well features of test images find training images of their class."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, new_progress, print_result
from qkd.cli.options.values import positive


def add(commands: Any) -> None:
    """Declare the command."""
    text = "measure how well features of test images retrieve training images of their class (mAP, top-100)"
    find = add_command(commands, "retrieve", retrieve, text, has_runs=True)
    find.add_argument("run", metavar="RUN", help="a run folder, or the name of a run")
    find.add_argument("--role", choices=("teacher", "student"), help="whose features (default: both, if trained)")
    find.add_argument(
        "--tap", metavar="PATH", help="module whose output to read (default: the last linear layer's input)"
    )
    text = "released: score as the published program does: up to rank 128, precision at the nearest recall"
    find.add_argument("--compat", choices=("correct", "released"), default="correct", help=text)
    find.add_argument("--limit", type=positive, metavar="N", help="at most N training images, stratified (all)")
    find.add_argument("--queries", type=positive, metavar="N", help="at most N test images, stratified (all)")


def retrieve(args: argparse.Namespace) -> int:
    """Score the features of a run's nets."""
    from qkd.analysis.run_retrieval import retrieve_target

    options = {"role": args.role, "tap": args.tap, "compat": args.compat, "limit": args.limit, "queries": args.queries}
    return print_result(args, retrieve_target(args.run, runs_dir=args.runs_dir, progress=new_progress(), **options))
