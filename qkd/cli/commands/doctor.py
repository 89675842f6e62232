"""`qkd doctor`: versions, devices, and whether another distribution uses our names."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.failures import DONE, FAILED


def add(commands: Any) -> None:
    """Declare the command."""
    add_command(commands, "doctor", doctor, "check versions, devices and name clashes")


def doctor(args: argparse.Namespace) -> int:
    """Check this machine; return 1 if another distribution uses our names."""
    from qkd.machine import examine

    report = examine()
    print_result(args, report)
    return DONE if report.is_healthy else FAILED
