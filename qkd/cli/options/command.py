"""Shared by sub-commands: common options, loading a config, printing a result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from qkd.cli.options import completion
from qkd.engines.membership import is_first
from qkd.failures import DONE
from qkd.files.user_paths import user_path

if TYPE_CHECKING:
    from qkd.config import RunConfig
    from qkd.progress import Progress

Command: TypeAlias = Callable[[argparse.Namespace], int]
STAGE_NAMES = ("teacher", "search", "distill", "export", "bench", "report")  # in the order of an experiment
CONFIG = ("CONFIG", "a YAML file, or a shipped config such as digits/w2a2")
CONFIG_OR_RUN = ("CONFIG|RUN", "a YAML file, a shipped config such as digits/w2a2, or a run folder")


def add_command(
    commands: Any,
    name: str,
    command: Command,
    text: str,
    *,
    config: tuple[str, str] | None = None,
    has_runs: bool = False,
) -> argparse.ArgumentParser:
    """Add a sub-command with the common options.

    Args:
        commands: What ``add_subparsers`` returned.
        name: Of the sub-command.
        command: What it does, with the parsed arguments; returns the exit code.
        text: One line about it.
        config: Placeholder and help of its first argument, if that is a config; overrides can follow it.
        has_runs: Whether it reads or writes run folders.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False
    )
    if config is not None:
        add_config(parser, config)
    if has_runs:
        parser.add_argument(
            "--runs-dir", type=user_path, default=Path("runs"), help="folder that holds the run folders (runs)"
        )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command)
    return parser


def add_config(parser: argparse.ArgumentParser, config: tuple[str, str], *, is_optional: bool = False) -> None:
    """Add a config and its overrides, which the shell completes.

    Args:
        parser: Of a command.
        config: Placeholder and help.
        is_optional: Whether it can be left out.
    """
    nargs = {"nargs": "?"} if is_optional else {}
    first = parser.add_argument("config", metavar=config[0], help=config[1], **nargs)  # type: ignore[arg-type]
    words = {"metavar": "key=value", "nargs": "*", "default": []}  # without a default, errors call it required
    others = parser.add_argument("overrides", help="e.g. student.train.epochs=3", **words)  # type: ignore[arg-type]
    first.completer, others.completer = completion.configs, completion.overrides  # type: ignore[attr-defined]


def load(args: argparse.Namespace, *, with_files: bool = False) -> RunConfig:
    """Return the config that the arguments mean.

    Args:
        args: With ``config`` and ``overrides``.
        with_files: Whether to look for the files that it names, too.

    Raises:
        qkd.failures.ConfigError: With every fault.
    """
    from qkd.checking import file_faults, name_faults, term_use_faults
    from qkd.config.binding import load_config

    require_config(args)
    folder = Path(args.config)
    if hasattr(args, "runs_dir") and (folder / "config.yaml").is_file():
        folder = folder.resolve()  # the folder's own config; the folder may have been renamed
        args.config, args.runs_dir = str(folder / "config.yaml"), folder.parent
        if not any(str(one).startswith("name=") for one in args.overrides):  # else it is the pattern of another run
            args.overrides = [*args.overrides, f"name={folder.name}"]
    checks = (name_faults, file_faults) if with_files else (name_faults,)
    return load_config(args.config, args.overrides, checks=checks, new=(term_use_faults,))


def require_config(args: argparse.Namespace) -> None:
    """Raise if a command for runs was given neither a config nor a run folder.

    Args:
        args: With ``config``, and ``runs_dir`` where the command has it.

    Raises:
        UsageError: If nothing has this name; lists what there is.
    """
    if not hasattr(args, "runs_dir") or (Path(args.config) / "config.yaml").is_file():
        return
    from qkd.config.binding import find_config
    from qkd.failures import ConfigError, UsageError
    from qkd.run.target import runs_in

    try:
        find_config(args.config)
    except ConfigError as error:
        raise UsageError(f"{error}; nor is it a run folder: {runs_in(args.runs_dir)}") from error


def meant(args: argparse.Namespace, config: RunConfig) -> RunConfig:
    """Return the config of the run that is meant: or of a run next to it, if its folder holds other bit widths."""
    from qkd.pipeline.siblings import beside

    return beside(config, args.runs_dir, new_progress())


def run_stages_of(config: RunConfig, names: Sequence[str], args: argparse.Namespace) -> int:
    """Run stages of an experiment, then print its closing table."""
    from qkd.engines.engine import current
    from qkd.pipeline import run_stages
    from qkd.pipeline.running import refuse_clients
    from qkd.report import summarize
    from qkd.run.folder import RunFolder
    from qkd.run.log import logged

    if config.federated is not None and getattr(args, "runtime", None) is not None:
        return _fitted_federated(config, args)
    refuse_clients(config)
    progress = new_progress()
    with (
        current().in_turn(lambda: RunFolder.open(config, runs_dir=args.runs_dir)) as run,
        logged(progress, run.path, f"qkd {args.name}: {', '.join(names)}"),
    ):
        run_stages(run, names, progress)
        if getattr(args, "strict", False):
            from qkd.stages.export import require_integer_layers

            current().first(lambda: require_integer_layers(run))
        if getattr(args, "runtime", None) is not None:
            from qkd.stages.fitted import keep_fitted

            current().first(lambda: [str(path) for path in keep_fitted(run, args.runtime, new_progress())])
        return print_result(args, summarize(run.path)) if is_first() else DONE


def new_progress() -> Progress:
    """Return bars and lines on stderr; with several training processes, only the first one reports."""
    from qkd.progress import Progress, Silent

    return Progress() if is_first() else Silent()


def print_result(args: argparse.Namespace, result: Any) -> int:
    """Print a result's ``to_text()`` or ``to_json()``, by the arguments; return exit code 0."""
    print(json.dumps(result.to_json(), indent=2) if args.json else result.to_text())
    return DONE


def _fitted_federated(config: RunConfig, args: argparse.Namespace) -> int:
    """Store the student of a complete federated run for another runtime, then print its table."""
    from qkd.failures import UsageError
    from qkd.federated.report import read_report
    from qkd.run.folder import RunFolder
    from qkd.stages.fitted import keep_fitted

    with RunFolder.open(config, runs_dir=args.runs_dir) as run:
        if why := run.why_incomplete("export"):
            raise UsageError(
                f"{run.path}: its student is not exported ({why}): run `qkd federate` with its config first"
            )
        keep_fitted(run, args.runtime, new_progress())
        return print_result(args, read_report(run.path, config.name, config.federated.model_dump(mode="json")))  # type: ignore[union-attr]
