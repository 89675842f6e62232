"""`qkd policy`: import published search logs, show schedules, draw augmented images."""

from __future__ import annotations

import argparse
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.cli.options.values import epochs, output_file, positive, whole
from qkd.files.user_paths import user_path


def add(commands: Any) -> None:
    """Declare the command."""
    text = "import published search logs, show schedules, draw augmented images"
    parser = commands.add_parser("policy", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    take = add_command(
        actions, "import", import_log, "convert a search log of PBA or role-kd to a schedule file; runs no code from it"
    )
    take.add_argument(
        "log", metavar="LOG", type=user_path, help="pbt_policy_<id>.txt, pbt_global.txt, or best.txt next to them"
    )
    take.add_argument("--epochs", type=positive, required=True, help="length of the search in epochs (published: 200)")
    take.add_argument(
        "--op-order",
        choices=("py2", "source"),
        required=True,
        help="py2: all published logs; source: logs of a Python 3 run of the released code",
    )
    take.add_argument(
        "--out", type=output_file(".yaml", ".yml"), required=True, metavar="FILE.yaml", help="schedule file to write"
    )
    take.add_argument("--trial", metavar="ID", help="whose lineage to follow in pbt_global.txt")
    take.add_argument("--role", choices=("teacher", "student"), help="role to note in the file")
    look = add_command(actions, "show", show, "show a schedule in words and as a picture")
    grid = add_command(actions, "sample", sample, "draw a grid of augmented images, one row per epoch")
    for action in (look, grid):
        action.add_argument("policy", metavar="FILE|POLICY", help="a schedule file, or a name of `qkd ls policies`")
    look.add_argument("--epochs", type=positive, help="stretch the schedule to this many epochs")
    look.add_argument(
        "--out", type=output_file(".svg", ".png"), metavar="FILE.svg|FILE.png", help="draw the schedule to FILE"
    )
    grid.add_argument("--data", required=True, metavar="NAME", help="a name of `qkd ls datasets`")
    grid.add_argument("--data-path", type=user_path, help="the data set's folder, for npz and folder")
    grid.add_argument("--data-root", type=user_path, help="where torchvision keeps its sets (data)")
    grid.add_argument("--image-size", type=positive, metavar="PIXELS", help="side that images are resized to (theirs)")
    grid.add_argument("--epochs", type=epochs, required=True, metavar="0,10,20", help="rows, counted from 0")
    grid.add_argument("--length", type=positive, help="length of training in epochs (the schedule's)")
    grid.add_argument("--seed", type=whole, default=0, help="random seed (0)")
    grid.add_argument("--out", type=output_file(".png"), required=True, metavar="FILE.png", help="picture to write")


def import_log(args: argparse.Namespace) -> int:
    """Turn a published search log into a schedule file."""
    from qkd.analysis.schedules import import_policy

    options = {"epochs": args.epochs, "op_order": args.op_order, "trial": args.trial, "role": args.role}
    return print_result(args, import_policy(args.log, args.out, **options))


def show(args: argparse.Namespace) -> int:
    """Print a schedule in words, and draw it if requested."""
    from qkd.analysis.schedules import show_policy

    return print_result(args, show_policy(args.policy, epochs=args.epochs, out=args.out))


def sample(args: argparse.Namespace) -> int:
    """Draw a grid of augmented images."""
    from qkd.analysis.schedules import sample_policy
    from qkd.config import DataConfig

    where = {} if args.data_root is None else {"root": args.data_root}
    data = DataConfig(name=args.data, path=args.data_path, image_size=args.image_size, **where)
    options = {"epochs": args.epochs, "out": args.out, "seed": args.seed, "length": args.length}
    return print_result(args, sample_policy(args.policy, data, **options))
