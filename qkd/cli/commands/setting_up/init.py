"""`qkd init`: a first config for a folder of images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.cli.options.values import output_file
from qkd.files.user_paths import user_path


def add(commands: Any) -> None:
    """Declare the command."""
    text = "inspect a folder of images and write a short config for training on it"
    parser = add_command(commands, "init", init, text)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=user_path, help=(
        "class folders of images, alone or in train/, test/ and val/; or train.npz and test.npz (default: digits)"
    ))  # fmt: skip
    parser.add_argument("--net", metavar="NET", help="a name of `qkd ls nets`, path/to/file.py:function, module:name")
    parser.add_argument("--weights", metavar="FILE", type=user_path, help="weights of the teacher: a file, or imagenet")
    parser.add_argument("--bits", default="w4a4", metavar="w4a4", help=(
        "bits of the student's weights and activations (default: %(default)s)"
    ))  # fmt: skip
    parser.add_argument(
        "--out",
        metavar="FILE.yaml",
        type=output_file(".yaml", ".yml", in_new_folder=True),
        help="file to write (default: named after FOLDER, in the current folder)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing config")


def init(args: argparse.Namespace) -> int:
    """Inspect the folder, write the config, and print what was found."""
    from qkd.failures import UsageError
    from qkd.nets.imagenet import IMAGENET
    from qkd.starting import first_config, look_at

    stem = "digits" if args.folder is None else args.folder.resolve().name or "run"
    file = args.out or Path(f"{stem}.yaml")
    if file.exists() and not args.force:
        raise UsageError(f"{file} already exists; choose another --out, or use --force to overwrite it")
    look = None if args.folder is None else look_at(args.folder)
    is_here = file.resolve().parent == Path.cwd()
    folder = args.folder if args.folder is None or is_here else args.folder.resolve()
    weights = args.weights
    if weights is not None and not is_here and str(weights) != IMAGENET:
        weights = weights.resolve()
    options = {"net": args.net, "weights": weights, "bits": args.bits}
    return print_result(args, first_config(look, folder, file, **options))
