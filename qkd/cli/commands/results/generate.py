"""`qkd generate`: a picture of the images that a data-free run has made."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.cli.options.values import output_file, positive, whole


def add(commands: Any) -> None:
    """Declare the command."""
    text = "draw the images that a data-free run made, epoch by epoch, and fresh ones"
    draw = add_command(commands, "generate", generate, text, has_runs=True)
    draw.add_argument("run", metavar="RUN", help="a run folder, or the name of a run")
    draw.add_argument("--out", type=output_file(".png"), required=True, metavar="FILE.png", help="picture to write")
    draw.add_argument("--count", type=positive, default=16, metavar="N", help="images in a row (16)")
    draw.add_argument("--seed", type=whole, default=0, help="for the fresh images (0)")


def generate(args: argparse.Namespace) -> int:
    """Draw a run's images."""
    from qkd.methods.data_free.run_generation import generate_target

    options = {"out": args.out, "count": args.count, "seed": args.seed}
    return print_result(args, generate_target(args.run, runs_dir=args.runs_dir, **options))
