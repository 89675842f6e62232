"""The command line: one module per sub-command in `commands/`, with its options, its call and its result."""

from qkd.cli.entry import build_parser, main, parse
from qkd.cli.options.command import STAGE_NAMES

__all__ = ["STAGE_NAMES", "build_parser", "main", "parse"]
