"""`qkd teacher`, `search`, `distill`, `export`: one stage of an experiment."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import CONFIG_OR_RUN, add_command, load, meant, run_stages_of
from qkd.cli.options.devices import add_devices, on_devices
from qkd.engines.membership import is_first
from qkd.failures import DONE

STAGE_HELP = {
    "teacher": "train the full-precision teacher with its own augmentation agent",
    "search": "find the augmentation schedules of both agents",
    "distill": "train the low-bit student from the teacher",
    "export": "write the student as ONNX and prove it equal to the trained student",
}


def add(commands: Any) -> None:
    """Declare the commands."""
    for name, text in STAGE_HELP.items():
        stage = add_command(commands, name, run_stage, text, config=CONFIG_OR_RUN, has_runs=True)
        if name != "export":
            add_devices(stage)
        else:
            strict = (
                "refuse a student with a layer left in float, even if the export is complete (or export.strict=true)"
            )
            stage.add_argument("--strict", action="store_true", help=strict)
            means = "add a file that is repacked for an older runtime: onnxruntime==1.17"
            stage.add_argument("--for", dest="runtime", metavar="RUNTIME", help=means)


def run_stage(args: argparse.Namespace) -> int:
    """Run one stage, then print the closing table."""
    if getattr(args, "runtime", None) is not None:
        from export.targets.asked import parse_runtime

        parse_runtime(args.runtime)  # a wrong one is reported before anything runs
    config = meant(args, load(args))
    if args.name == "export":
        return run_stages_of(config, (args.name,), args) if is_first() else DONE
    return on_devices(args, config, lambda: run_stages_of(config, (args.name,), args))
