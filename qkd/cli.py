"""The command line: the parser of all commands, and how errors end; what a command does is in `commands.py`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from qkd import commands as do
from qkd.commands import STAGE_NAMES, TABLE_NAMES
from qkd.failures import FAILED, INTERRUPTED, UsageError, classify, write_traceback
from qkd.files.user_paths import user_path
from qkd.foreign.shown import clean_output, shown_line

STAGE_HELP = {
    "teacher": "train the full-precision teacher with its own agent",
    "search": "settle both agents' schedules",
    "distill": "train the low-bit student from the teacher",
    "export": "write the student as ONNX and prove it equal to the trained model",
    "bench": "measure the latency of ONNX files, here and on devices",
    "report": "write report.html and report.md",
}

# command -> placeholder and help of its first argument, where that may be more than a config
CONFIG_MEANS = {"bench": ("CONFIG|MODEL", "a config; or an ONNX file or run folder, more may follow")}

EXAMPLES = """examples:
  qkd run digits/w2a2                                 every stage; resumes where it stopped
  qkd run digits/w2a2 student.train.epochs=3 name=short
  qkd run my.yaml --dry-run                           find faults before training
  qkd validate my.yaml                                all faults of a config at once
  qkd bench runs/digits-w2a2 --on local --on ssh://pi@board --int8-baseline
  qkd ls nets
  qkd policy show pba --out schedule.svg              draw what an agent does over the epochs
  qkd cost digits/w2a2 --layers                       parameters, operations, bytes: no training needed
  qkd diagnose runs/digits-w2a2 --out teacher.svg     what its teacher tells, and which known failure it shows
  qkd retrieve runs/digits-w2a2                       do features find images of their class?
  qkd match runs/digits-w2a2                          which layers of the teacher to follow with which

exit codes: 0 done, 1 the run or a parity check failed, 2 the input is wrong, 130 interrupted"""

MOST_DIGITS = 9  # of a whole number among the arguments
CPU, MOST_CPUS = "[0-9]{1,4}", 8192  # a CPU's number; Linux is built for at most so many

Command: TypeAlias = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: The arguments; ``sys.argv`` where absent.
    """
    with clean_output():
        return _main(parse(sys.argv[1:] if argv is None else argv))


def _main(args: argparse.Namespace) -> int:
    command: Command = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        return _interrupted(args)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing is left to say
        return FAILED
    except Exception as error:
        return _failed(error, args)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments; overrides may stand before and after options.

    Raises:
        SystemExit: With code 2 for arguments that are not known, 0 after ``--help``.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    takes = hasattr(args, "overrides")
    models = args.name == "bench"  # whose further models may stand behind options, too
    unknown = [text for text in rest if text.startswith("-") or not takes or ("=" not in text and not models)]
    if unknown:
        parser.error(f"unknown argument(s): {' '.join(unknown)}; `qkd {args.name} --help` lists what there is")
    if rest:
        args.overrides = [*args.overrides, *rest]
    for name in ("config", "run", "policy"):  # a name or a path: text, until it is known which
        if str(getattr(args, name, "")).startswith("~"):
            setattr(args, name, str(user_path(getattr(args, name))))
    if models:
        args.overrides = [str(user_path(text)) if text.startswith("~") else text for text in args.overrides]
    return args


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="qkd",
        description="Teacher -> low-bit student -> ONNX -> parity -> latency -> report.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    run = _add(commands, "run", do.run_all, "every stage, resuming where it stopped", needs_config=True, has_runs=True)
    run.add_argument("--dry-run", action="store_true", help="try every step on two batches; measures and keeps nothing")
    run.add_argument("--until", choices=STAGE_NAMES, default=STAGE_NAMES[-1], help="the last stage to run")
    for name in STAGE_NAMES:
        command = do.run_bench if name == "bench" else do.run_stage
        stage = _add(commands, name, command, STAGE_HELP[name], needs_config=True, has_runs=True)
        if name == "bench":
            _add_bench_options(stage)
        if name == "export":
            text = "a layer that stays in float is an error, also of an export that is complete (or export.strict=true)"
            stage.add_argument("--strict", action="store_true", help=text)
    ls = _add(commands, "ls", do.list_names, "configs, data sets, nets, losses, quantizers, devices, policies")
    ls.add_argument("table", nargs="?", choices=TABLE_NAMES, help="only this one")
    _add(commands, "show", do.show, "the resolved config, every default filled in", needs_config=True)
    _add(commands, "validate", do.validate, "all faults of a config at once; runs nothing", needs_config=True)
    text = "parameters, operations and memory of a student, beside its FP32 twin; nothing is trained"
    count = _add(commands, "cost", do.cost, text, has_runs=True)
    count.add_argument("config", metavar="MODEL.onnx|RUN|CONFIG", help="an ONNX file, a run (folder or name), a config")
    count.add_argument("overrides", metavar="key=value", nargs="*", help="with a CONFIG, e.g. student.quant.act_bits=2")
    count.add_argument("--layers", action="store_true", help="every layer, too (--json always has them)")
    _add_measuring_commands(commands)
    _add_policy_commands(commands)
    _add(commands, "doctor", do.doctor, "versions, devices, name clashes")
    return parser


def _add(
    commands: Any, name: str, command: Command, text: str, *, needs_config: bool = False, has_runs: bool = False
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    if needs_config:
        meta, meant = CONFIG_MEANS.get(name, ("CONFIG", "a YAML file, or a shipped config such as digits/w2a2"))
        parser.add_argument("config", metavar=meta, help=meant)
        parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. student.train.epochs=3")
    if has_runs:
        parser.add_argument("--runs-dir", type=user_path, default=Path("runs"), help="folder of run folders (runs)")
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command)
    return parser


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s CONFIG [key=value ...]\n       %(prog)s MODEL [MODEL ...] [--on DEVICE] [options]"
    parser.description = "Measure a config's run, or models (ONNX files, run folders), here and on devices."
    group = parser.add_argument_group("for models (a config has a bench section instead)")
    for words in (
        ("--on", "append", None, "DEVICE", "local, ssh://[user@]host[:port], adb://SERIAL or a name; may be repeated"),
        ("--devices", None, user_path, "FILE", "file of named devices (~/.config/qkd/devices.yaml)"),
        ("--threads", None, _whole, "N", "intra-op threads (1)"),
        ("--rounds", None, _whole, "N", "timed inferences per model, interleaved (200)"),
        ("--warmup", None, _whole, "N", "inferences before the clock starts (20)"),
        ("--batch-size", None, _whole, "N", "images per inference (1)"),
        ("--provider", None, str, "NAME", "execution provider (CPUExecutionProvider)"),
        ("--affinity", None, _cpus, "CPUS", "pin to these CPUs, e.g. 0,1 or 4-7"),
        ("--sample", None, user_path, "FILE", "npz of images, labels: score the models on it where they run"),
        ("--timeout", None, _finite, "SECONDS", "longest duration of one command on a device (600)"),
        ("--output", None, user_path, "FILE", "write the result as JSON, too"),
    ):
        option, action, kind, meta, text = words
        group.add_argument(option, action=action, type=kind, metavar=meta, help=text)  # type: ignore[arg-type]
    group.add_argument(
        "--int8-baseline", action="store_true", help="measure onnxruntime's static int8 of the float model, too"
    )


def _add_measuring_commands(commands: Any) -> None:
    text = "what a teacher's soft targets tell, on its training images, and which known failure they show"
    look = _add(commands, "diagnose", do.diagnose, text, has_runs=True)
    look.add_argument("config", metavar="CONFIG|RUN", help="a run (folder or name) with a teacher, or its config")
    look.add_argument("overrides", metavar="key=value", nargs="*", help="with a CONFIG, e.g. name=other-run")
    look.add_argument("--limit", type=_positive, metavar="N", help="at most N training images, stratified (all)")
    look.add_argument("--temperature", type=_finite, metavar="T", help="of the distillation (the config's)")
    look.add_argument("--out", type=user_path, metavar="FILE.svg|FILE.png", help="draw it")
    text = "how well features of test images find training images of their class (mAP, top-100)"
    find = _add(commands, "retrieve", do.retrieve, text, has_runs=True)
    find.add_argument("run", metavar="RUN", help="a run folder, or the name of a run")
    find.add_argument("--role", choices=("teacher", "student"), help="whose features (of both, as far as trained)")
    find.add_argument("--tap", metavar="PATH", help="module whose output to read (the last linear layer's input)")
    text = "released: as the published program scores: up to rank 128, precision at the nearest recall"
    find.add_argument("--compat", choices=("correct", "released"), default="correct", help=text)
    find.add_argument("--limit", type=_positive, metavar="N", help="at most N training images, stratified (all)")
    find.add_argument("--queries", type=_positive, metavar="N", help="at most N test images, stratified (all)")
    text = "which teacher layer each student layer should follow: pairs of taps, by what layers tell about the class"
    pairs = _add(commands, "match", do.match, text, has_runs=True)
    pairs.add_argument("run", metavar="RUN", help="a run folder, or the name of a run")
    for role in ("student", "teacher"):
        text = f"the {role}'s layers, from input to output (of residual nets: the stages, then the pooled features)"
        pairs.add_argument(f"--{role}-taps", nargs="+", metavar="PATH", help=text)
    pairs.add_argument("--limit", type=_positive, metavar="N", help="at most N training images, stratified (2000)")


def _add_policy_commands(commands: Any) -> None:
    text = "import published search logs, show schedules, draw augmented images"
    parser = commands.add_parser("policy", help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    take = _add(
        actions, "import", do.policy_import, "a search log of PBA or role-kd as a schedule file; nothing in it is run"
    )
    take.add_argument(
        "log", metavar="LOG", type=user_path, help="pbt_policy_<id>.txt, pbt_global.txt, or best.txt beside them"
    )
    take.add_argument("--epochs", type=_positive, required=True, help="length of the search (published: 200)")
    take.add_argument(
        "--op-order",
        choices=("py2", "source"),
        required=True,
        help="py2: all published logs; source: logs of a Python 3 run of the released code",
    )
    take.add_argument("--out", type=user_path, required=True, metavar="FILE.yaml", help="schedule file to write")
    take.add_argument("--trial", metavar="ID", help="whose lineage to follow in pbt_global.txt")
    take.add_argument("--role", choices=("teacher", "student"), help="noted in the file")
    look = _add(actions, "show", do.policy_show, "a schedule in words, and as a picture")
    grid = _add(actions, "sample", do.policy_sample, "a grid of augmented images, one row per epoch")
    for action in (look, grid):
        action.add_argument("policy", metavar="FILE|POLICY", help="a schedule file, or a name of `qkd ls policies`")
    look.add_argument("--epochs", type=_positive, help="stretch it to this length")
    look.add_argument("--out", type=user_path, metavar="FILE.svg|FILE.png", help="draw it")
    grid.add_argument("--data", required=True, metavar="NAME", help="a name of `qkd ls datasets`")
    grid.add_argument("--data-path", type=user_path, help="folder of npz and folder sets")
    grid.add_argument("--data-root", type=user_path, help="where torchvision keeps its sets (data)")
    grid.add_argument("--epochs", type=_epochs, required=True, metavar="0,10,20", help="rows, counted from 0")
    grid.add_argument("--length", type=_positive, help="epochs of the training (the schedule's)")
    grid.add_argument("--seed", type=_whole, default=0, help="of the draws (0)")
    grid.add_argument("--out", type=user_path, required=True, metavar="FILE.png", help="picture to write")


def _whole(text: str) -> int:
    """Return a whole number of a bounded number of digits; its own range is checked where it is used."""
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdecimal() or len(digits) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at most {MOST_DIGITS} digits, got {shown_line(repr(text), 40)}"
        )
    return int(text)


def _positive(text: str) -> int:
    if text.startswith("-") or _whole(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {shown_line(repr(text), 40)}")
    return value


def _epochs(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) <= MOST_DIGITS for part in parts):
        raise argparse.ArgumentTypeError(f"must be epochs such as 0,10,20, got {shown_line(repr(text), 40)}")
    return tuple(int(part) for part in parts)


def _cpus(text: str) -> tuple[int, ...]:
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not re.fullmatch(CPU, first) or (dash and not re.fullmatch(CPU, last)):
            raise argparse.ArgumentTypeError(
                f"must be numbers of CPUs such as 0,1 or 4-7, got {shown_line(repr(text), 40)}"
            )
        cpus += range(int(first), int(last if dash else first) + 1)
        if len(cpus) > MOST_CPUS:
            raise argparse.ArgumentTypeError(f"names more than {MOST_CPUS} CPUs")
    return tuple(cpus)


def _interrupted(args: argparse.Namespace) -> int:
    resumable = args.name in ("run", *STAGE_NAMES) and not getattr(args, "dry_run", False)
    hint = "; nothing is lost: the same command resumes where it stopped" if resumable else ""
    print(f"\nqkd: interrupted{hint}", file=sys.stderr)
    return INTERRUPTED


def _failed(error: Exception, args: argparse.Namespace) -> int:
    if args.debug:
        import traceback

        traceback.print_exception(error)
    failure = classify(error)
    where = "" if failure.is_expected or args.debug else f" (traceback: {write_traceback(error)})"
    hint = f"\nqkd {args.name} --help says more" if isinstance(error, UsageError) else ""
    head = f"qkd: {failure.faults} faults:\n" if failure.faults > 1 else "qkd: "
    print(f"{head}{failure.message}{where}{hint}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": failure.message, "exit_code": failure.exit_code}))
    return failure.exit_code


class _Version(argparse.Action):
    """Prints the version; reads it only when asked."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from qkd.doctor import own_version

        print(f"qkd {own_version()}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
