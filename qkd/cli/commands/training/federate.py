"""`qkd federate`: clients that keep their images train one student."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import CONFIG_OR_RUN, add_command, load, new_progress, print_result

ABOUT = (
    "Train one low-bit student with clients that keep their images, and export it. The config has a section "
    "`federated` (`qkd show --explain federated`) and no teacher. Resumes where it stopped, and writes accuracy by "
    "round and by bytes to RUN/federated/."
)


def add(commands: Any) -> None:
    """Declare the command."""
    text = "train one student with clients that keep their images"
    parser = add_command(commands, "federate", federate, text, config=CONFIG_OR_RUN, has_runs=True)
    parser.description = ABOUT


def federate(args: argparse.Namespace) -> int:
    """Take every round, export the student, print accuracy by round and bytes."""
    config = load(args, with_files=True)
    from qkd.run.folder import RunFolder
    from qkd.run.log import logged
    from qkd.stages.federate import clients_of
    from qkd.stages.federate import federate as run_federated

    clients_of(config)

    progress = new_progress()
    with RunFolder.open(config, runs_dir=args.runs_dir) as run, logged(progress, run.path, "qkd federate"):
        return print_result(args, run_federated(run, progress))
