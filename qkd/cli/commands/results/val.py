"""`qkd val`: accuracy of an exported file on labeled images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qkd.cli.options.command import add_command, print_result


def add(commands: Any) -> None:
    """Declare the command."""
    text = "score an exported file on labeled images, class by class"
    parser = add_command(commands, "val", val, text, has_runs=True)
    parser.add_argument("model", metavar="MODEL|RUN", help="an ONNX file, or a run (its student is used)")
    means = "a folder of class folders, an npz file of images and labels, or a config or run (its test set is used)"
    parser.add_argument("data", metavar="DATA", help=means)


def val(args: argparse.Namespace) -> int:
    """Score the file and print its accuracy."""
    from qkd.predicting.scoring import score_file
    from qkd.predicting.targets import model_file
    from qkd.run.target import run_folder

    run = None if Path(args.data).exists() else run_folder(args.data, args.runs_dir)
    data = args.data if run is None else str(run)
    return print_result(args, score_file(model_file(args.model, args.runs_dir), data))
