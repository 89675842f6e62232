"""`qkd show`: the resolved config."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qkd.cli.options.command import CONFIG, add_command, load
from qkd.failures import DONE


def add(commands: Any) -> None:
    """Declare the command."""
    add_command(commands, "show", show, "the resolved config, every default filled in", config=CONFIG)


def show(args: argparse.Namespace) -> int:
    """Print the config as YAML, or JSON."""
    from qkd.config.binding import config_text

    config = load(args)
    print(json.dumps(config.model_dump(mode="json")) if args.json else config_text(config), end="")
    return DONE
