"""`qkd show`: the resolved config, what its keys mean, the schema of config files."""

from __future__ import annotations

import argparse
import json
from typing import Any

from qkd.cli.options.command import CONFIG, add_command, add_config, load, print_result
from qkd.failures import DONE, UsageError


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(commands, "show", show, "print the resolved config with all defaults, or explain its keys")
    add_config(parser, CONFIG, is_optional=True)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--explain", metavar="KEY", nargs="?", const="", help="explain all keys, or those below KEY")
    asked.add_argument("--schema", action="store_true", help="print the JSON Schema of config files, for editors")


def show(args: argparse.Namespace) -> int:
    """Print the config as YAML or JSON, or what can be in one."""
    from qkd.config.binding import config_text
    from qkd.config.explaining import explained, json_schema

    if args.explain is not None:
        return print_result(args, explained(args.explain))
    if args.schema:
        print(json.dumps(json_schema(), indent=2))
        return DONE
    if args.config is None:
        raise UsageError("name a CONFIG to show, or ask for --explain or --schema")
    config = load(args)
    print(json.dumps(config.model_dump(mode="json")) if args.json else config_text(config), end="")
    return DONE
