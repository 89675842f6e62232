"""`qkd report`: the page and the text of a run."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import CONFIG_OR_RUN, add_command, load, run_stages_of


def add(commands: Any) -> None:
    """Declare the command."""
    add_command(commands, "report", report, "write report.html and report.md", config=CONFIG_OR_RUN, has_runs=True)


def report(args: argparse.Namespace) -> int:
    """Write the report if it is not up to date, then print the closing table."""
    return run_stages_of(load(args), (args.name,), args)
