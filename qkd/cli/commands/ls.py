"""`qkd ls`: the names that a config may hold."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, print_result

TABLE_NAMES = ("configs", "datasets", "nets", "losses", "quantizers", "devices", "policies")


def add(commands: Any) -> None:
    """Declare the command."""
    ls = add_command(commands, "ls", list_names, "configs, data sets, nets, losses, quantizers, devices, policies")
    ls.add_argument("table", nargs="?", choices=TABLE_NAMES, help="only this one")


def list_names(args: argparse.Namespace) -> int:
    """Print the tables, or one."""
    from qkd.checking.names import Listing, table

    names = TABLE_NAMES if args.table is None else (args.table,)
    return print_result(args, Listing({name: table(name) for name in names}))
