"""`qkd validate`: all faults of a config at once."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qkd.cli.options.command import CONFIG, add_command, load
from qkd.failures import DONE


def add(commands: Any) -> None:
    """Declare the command."""
    add_command(commands, "validate", validate, "report all faults of a config at once; runs nothing", config=CONFIG)


def validate(args: argparse.Namespace) -> int:
    """Look for faults; none is an answer, too."""
    config = load(args, with_files=True)
    print(json.dumps({"name": config.name, "faults": []}) if args.json else f"{args.config}: no faults")
    return DONE
