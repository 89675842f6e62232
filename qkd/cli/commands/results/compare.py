"""`qkd compare`: runs side by side."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.cli.options.values import output_file


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "compare",
        compare,
        "compare runs with the first one: accuracy, size, latency, and which differences are noise",
        has_runs=True,
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or names of runs")
    parser.add_argument(
        "--out", type=output_file(".html", ".htm"), metavar="FILE.html", help="also write the table as an HTML page"
    )


def compare(args: argparse.Namespace) -> int:
    """Print the table, and write the page if requested."""
    from qkd.report.comparing.comparison import compare_runs, write_comparison
    from qkd.run.target import require_run_folder

    table = compare_runs([require_run_folder(name, args.runs_dir) for name in args.runs])
    if args.out is not None:
        write_comparison(table, args.out)
    return print_result(args, table)
