"""`qkd ls`: the names that a config can use, and the runs in a folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.cli.options.values import output_file
from qkd.failures import UsageError
from qkd.files.user_paths import user_path

TABLE_NAMES = ("configs", "datasets", "nets", "losses", "methods", "quantizers", "devices", "policies", "targets")

RUNS = "runs"


def add(commands: Any) -> None:
    """Declare the command."""
    about = "configs, data sets, nets, losses, methods, quantizers, devices, policies, targets, runs"
    ls = add_command(commands, "ls", list_names, about)
    ls.add_argument(
        "table", nargs="?", choices=(*TABLE_NAMES, RUNS), help="what to list; `runs` lists the runs in FOLDER"
    )
    ls.add_argument(
        "folder",
        nargs="?",
        type=user_path,
        metavar="FOLDER",
        help="with runs: folder that holds the run folders (runs)",
    )
    ls.add_argument(
        "--out",
        type=output_file(".html", ".htm"),
        metavar="FILE.html",
        help="with runs: also write the table as an HTML page",
    )


def list_names(args: argparse.Namespace) -> int:
    """Print the tables, or one."""
    if args.table == RUNS:
        return _list_runs(args)
    if args.folder is not None or args.out is not None:
        raise UsageError("`qkd ls runs` takes a folder and --out; the other tables take neither")
    from qkd.checking.names import Listing, table

    names = TABLE_NAMES if args.table is None else (args.table,)
    return print_result(args, Listing({name: table(name) for name in names}))


def _list_runs(args: argparse.Namespace) -> int:
    from qkd.report.comparing.comparison import runs_below, write_comparison

    folder = args.folder or Path("runs")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise UsageError(f"{folder}: {what}; name the folder that holds the run folders")
    table = runs_below(folder)
    if args.out is not None:
        write_comparison(table, args.out)
    return print_result(args, table)
