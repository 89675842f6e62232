"""The command line: a module a sub-command in `commands/`, with its options, its call and its result."""

from qkd.cli.command import STAGE_NAMES
from qkd.cli.entry import build_parser, main, parse

__all__ = ["STAGE_NAMES", "build_parser", "main", "parse"]
