"""Parse the arguments, call the sub-command, and turn how it ends into an exit code."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from qkd.cli.commands import (
    bench,
    cost,
    diagnose,
    doctor,
    ls,
    match,
    policy,
    report,
    retrieve,
    run,
    show,
    stage,
    validate,
)
from qkd.cli.commands.deployment import lowbit
from qkd.cli.commands.results import compare, generate, predict, val
from qkd.cli.commands.setting_up import init
from qkd.cli.commands.training import federate
from qkd.cli.options.command import STAGE_NAMES, Command
from qkd.cli.options.completion import complete
from qkd.engines.membership import attend_parent, is_first, is_member, is_started_by_us
from qkd.failures import DONE, FAILED, INTERRUPTED, UsageError, classify, write_traceback
from qkd.files.user_paths import user_path
from qkd.foreign.shown import clean_output

EXAMPLES = """examples:
  qkd init my-images                                  inspect a folder of images and write a config
  qkd run digits/w2a2                                 run every stage; resume where it stopped
  qkd run digits/w2a2 student.train.epochs=3 name=short
  qkd run digits/w2a2 --devices 2                     two processes share every batch
  qkd run my.yaml --dry-run                           find faults before training
  qkd validate my.yaml                                all faults of a config at once
  qkd bench runs/digits-w2a2 --on local --on ssh://pi@board --int8-baseline
  qkd predict runs/digits-w2a2 photo.png              classify an image
  qkd val runs/digits-w2a2 my-images/                 score it on labeled images, class by class
  qkd compare runs/digits-w2a2 runs/digits-w4a4       differences, and which are noise; `qkd ls runs` lists runs
  qkd ls nets
  qkd policy show pba --out schedule.svg              draw what an agent does over the epochs
  qkd cost digits/w2a2 --layers                       parameters, operations and bytes, without training
  qkd diagnose runs/digits-w2a2 --out teacher.svg     what the teacher's outputs reveal, and known failures
  qkd retrieve runs/digits-w2a2                       do features find images of their class?
  qkd match runs/digits-w2a2                          which teacher layer each student layer should follow
  qkd federate digits/federated/fedgen                train one student with clients that keep their images
  qkd generate runs/digits-data-free-rdskd --out grid.png   the images that a data-free run learned from

exit codes: 0 done, 1 the run or a parity check failed, 2 the input is wrong, 130 interrupted"""

OLD_NAME = "the old name will be removed in the next release"  # in every warning of a renamed key

# in the order of `qkd --help`
COMMANDS = (
    init, run, stage, federate, bench, report, predict, val, compare, ls, show, validate, cost, diagnose, retrieve,
    match, generate, policy, lowbit, doctor,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: The arguments; default: ``sys.argv``.

    Returns:
        0 for success, 1 for an error of ours, 2 for bad input, 130 for an interruption.

    Raises:
        SystemExit: With code 2 for arguments that are not known, 0 after ``--help``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with clean_output(), warnings.catch_warnings():
        quiet_cuda()
        warnings.filterwarnings("default", f".*{OLD_NAME}", DeprecationWarning)
        warnings.showwarning = _shown_as_ours(warnings.showwarning)
        args = parse(arguments)
        args.argv = arguments
        return _main(args)


def _shown_as_ours(others: Callable[..., None]) -> Callable[..., None]:
    """Return what shows warnings: ours in a line for people, without a place in our source, and once."""
    shown = set[str]()

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        is_old_name = category is DeprecationWarning and OLD_NAME in str(message)
        # by its name, since quantizers would import PyTorch
        if is_old_name or any(kind.__name__ == "PrepareWarning" for kind in category.__mro__):
            if str(message) not in shown:
                print(f"warning: {message}", file=sys.stderr)
            shown.add(str(message))
        else:
            others(message, category, *place)

    return show


def quiet_cuda() -> None:
    """Silence PyTorch's message about a CUDA compiler without a GPU, which is irrelevant to commands.

    Brevitas imports PyTorch's extension builder, which logs it once.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_not_about_cuda)


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("No CUDA runtime is found")


def _main(args: argparse.Namespace) -> int:
    command: Command = args.command
    attend_parent()
    if not is_first() and args.name not in ("run", *STAGE_NAMES):
        return DONE  # torchrun started several processes for a single-process command
    try:
        return command(args)
    except KeyboardInterrupt:
        return _interrupted(args)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has exited; there is nothing left to print
        return FAILED
    except Exception as error:
        return _failed(error, args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments; overrides can come before and after options.

    Args:
        argv: The arguments, without the program's name.

    Returns:
        The options by name; ``command`` is what to call with them.

    Raises:
        SystemExit: With code 2 for arguments that are not known, 0 after ``--help``.
    """
    parser = build_parser()
    complete(parser)
    args, rest = parser.parse_known_args(argv)
    takes = hasattr(args, "overrides")
    models = args.name == "bench"  # whose further models can also come after options
    unknown = [text for text in rest if text.startswith("-") or not takes or ("=" not in text and not models)]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; `qkd {args.name} --help` lists what there is")
    if rest:
        args.overrides = [*args.overrides, *rest]
    for name in ("config", "run", "policy"):  # a name or a path: text, until it is known which
        if str(getattr(args, name, "")).startswith("~"):
            setattr(args, name, str(user_path(getattr(args, name))))
    if models:
        args.overrides = [str(user_path(text)) if text.startswith("~") else text for text in args.overrides]
    return args


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Returns:
        A parser whose result names the command (``name``) and holds its function (``command``).
    """
    parser = argparse.ArgumentParser(
        prog="qkd",
        description="Teacher -> low-bit student -> ONNX -> parity -> latency -> report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _interrupted(args: argparse.Namespace) -> int:
    resumable = args.name in ("run", "federate", *STAGE_NAMES) and not getattr(args, "dry_run", False)
    again = "measures again" if args.name == "bench" else "resumes from the last checkpoint"
    hint = f"; the same command {again}" if resumable else ""
    if is_first() and not is_started_by_us():
        print(f"\nqkd: interrupted{hint}", file=sys.stderr)
    return INTERRUPTED


def _failed(error: Exception, args: argparse.Namespace) -> int:
    if is_member():
        from qkd.engines.joining import exit_code, speaks_up

        if not speaks_up(error):
            return exit_code(error, classify(error).exit_code)
    if args.debug:
        import traceback

        traceback.print_exception(error)
    failure = classify(error)
    where = "" if failure.is_expected or args.debug else f" (traceback: {write_traceback(error)})"
    hint = f"\nsee `qkd {args.name} --help`" if isinstance(error, UsageError) else ""
    head = f"qkd: {failure.faults} faults:\n" if failure.faults > 1 else "qkd: "
    print(f"{head}{failure.message}{where}{hint}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": failure.message, "exit_code": failure.exit_code}))
    return failure.exit_code


class _Version(argparse.Action):
    """Prints the version; reads it only on request."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from qkd.machine import own_version

        print(f"qkd {own_version()}")
        parser.exit()
