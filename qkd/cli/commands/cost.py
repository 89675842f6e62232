"""`qkd cost`: what a file, a run's student or a config's student costs."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, load, print_result


def add(commands: Any) -> None:
    """Declare the command."""
    text = "count parameters, operations and memory of a student and its FP32 twin, without training"
    count = add_command(commands, "cost", cost, text, has_runs=True)
    count.add_argument("config", metavar="MODEL.onnx|RUN|CONFIG", help="an ONNX file, a run (folder or name), a config")
    count.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="with a CONFIG, e.g. student.quant.act_bits=2"
    )
    count.add_argument("--layers", action="store_true", help="also list every layer (--json always does)")


def cost(args: argparse.Namespace) -> int:
    """Count, and print totals or layers."""
    from qkd.analysis.costing import CostTable, cost_of_target

    report = cost_of_target(args.config, runs_dir=args.runs_dir, overrides=args.overrides, load=lambda: load(args))
    return print_result(args, CostTable(report, has_layers=args.layers))
