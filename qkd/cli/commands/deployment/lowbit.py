"""`qkd lowbit`: make the low-bit execution provider for another device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from qkd.cli.options.command import add_command, print_result
from qkd.cli.options.values import output_file
from qkd.files.user_paths import user_path

TARGETS = ("aarch64-linux", "x86_64-linux")
EXAMPLES = """examples:
  qkd lowbit build                                          for this machine, into the cache
  qkd lowbit build --target aarch64-linux --out liblowbit.so
  qkd lowbit wheel --target aarch64-linux --out dist        pip install it on the device, next to onnxruntime

wheel and --target need a cross-compiler: pip install 'qkd-toolkit[cross]' (the package ziglang, 100 MB, nothing else).
Libraries for another device run on any Linux with glibc 2.28 or newer. On the device:
  onnxruntime.register_execution_provider_library("LowBitExecutionProvider", "/path/liblowbit.so")"""


def add(commands: Any) -> None:
    """Declare the command."""
    text = "build the low-bit execution provider as a library or a wheel, for this machine or another device"
    parser = commands.add_parser(
        "lowbit", help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    make = add_command(actions, "build", build, "compile the library")
    make.add_argument("--out", type=output_file(), metavar="FILE", help="file to write (default: in the cache)")
    pack = add_command(actions, "wheel", wheel, "compile the library and write the wheel onnxruntime-ep-lowbit")
    pack.add_argument(
        "--out", type=user_path, metavar="DIR", default=Path("dist"), help="folder to write the wheel to (dist)"
    )
    for action in (make, pack):
        action.add_argument("--target", choices=TARGETS, help="machine that it is for (this one)")


def build(args: argparse.Namespace) -> int:
    """Compile the library."""
    from export.lowbit.deployment import build_library

    return print_result(args, build_library(args.target, args.out))


def wheel(args: argparse.Namespace) -> int:
    """Compile the library and write the wheel."""
    from export.lowbit.deployment import build_wheel

    return print_result(args, build_wheel(args.target, args.out))
