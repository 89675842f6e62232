"""`qkd match`: which teacher layer each student layer should follow."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, new_progress, print_result
from qkd.cli.options.values import positive


def add(commands: Any) -> None:
    """Declare the command."""
    text = "suggest which teacher layer each student layer should follow, by what the layers say about the class"
    pairs = add_command(commands, "match", match, text, has_runs=True)
    pairs.add_argument("run", metavar="RUN", help="a run folder, or the name of a run")
    for role in ("student", "teacher"):
        text = f"the {role}'s layers, input to output (default for residual nets: the stages, then the pooled features)"
        pairs.add_argument(f"--{role}-taps", nargs="+", metavar="PATH", help=text)
    pairs.add_argument("--limit", type=positive, metavar="N", help="at most N training images, stratified (2000)")


def match(args: argparse.Namespace) -> int:
    """Pair the layers of a run's nets by what they say about the class."""
    from qkd.analysis.run_matching import match_target

    taps = {"student_taps": args.student_taps, "teacher_taps": args.teacher_taps}
    limit = {} if args.limit is None else {"limit": args.limit}
    return print_result(args, match_target(args.run, runs_dir=args.runs_dir, progress=new_progress(), **taps, **limit))
