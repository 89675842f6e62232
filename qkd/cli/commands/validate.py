"""`qkd validate`: all faults of a config at once."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from qkd.cli.options.command import CONFIG, add_command, load
from qkd.failures import DONE


def add(commands: Any) -> None:
    """Declare the command."""
    add_command(
        commands, "validate", validate, "report all faults of a config at once, without running anything", config=CONFIG
    )


def validate(args: argparse.Namespace) -> int:
    """Look for faults, and print them or that there are none."""
    config = load(args, with_files=True)
    more = f"qkd run {shlex.join([args.config, *args.overrides])} --dry-run"
    found = (
        f"{args.config}: no faults in keys, names and files\nnot checked: nets, images, export; `{more}` checks them"
    )
    print(json.dumps({"name": config.name, "faults": []}) if args.json else found)
    return DONE
