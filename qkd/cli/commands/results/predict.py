"""`qkd predict`: classify images with an exported file."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.cli.options.values import positive


def add(commands: Any) -> None:
    """Declare the command."""
    text = "classify images with an exported file"
    parser = add_command(commands, "predict", predict, text, has_runs=True)
    parser.add_argument("model", metavar="MODEL|RUN", help="an ONNX file, or a run (its student is used)")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files, folders of them, .npy of uint8 pixels")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes shown for each image (5)")


def predict(args: argparse.Namespace) -> int:
    """Classify the images and print what was found."""
    from qkd.failures import BAD_INPUT
    from qkd.predicting.answers import answer
    from qkd.predicting.targets import model_file

    found = answer(model_file(args.model, args.runs_dir), args.images, top=args.top)
    code = print_result(args, found)
    return BAD_INPUT if found.unread else code
