"""What each command of the command line does: load, call, print; the parser is in `cli.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qkd.failures import BAD_INPUT, DONE, FAILED

if TYPE_CHECKING:
    from qkd.config import RunConfig

STAGE_NAMES = ("teacher", "search", "distill", "export", "bench", "report")
TABLE_NAMES = ("configs", "datasets", "nets", "losses", "quantizers", "devices", "policies")


def run_all(args: argparse.Namespace) -> int:
    """``qkd run``: every stage (or up to one), then the closing table."""
    config = _load(args)
    stages, is_fresh = STAGE_NAMES[: STAGE_NAMES.index(args.until) + 1], not (args.runs_dir / config.name).exists()
    if args.dry_run or is_fresh:
        _load(args, with_files=True)  # a fresh run needs all of them: say before training which are missing
        from qkd.dryrun import check_distillation, dry_run

        if args.dry_run:
            return _print(args, dry_run(config, _progress()))
        if "distill" in stages:
            check_distillation(config, _progress())
    return _run(config, stages, args)


def run_stage(args: argparse.Namespace) -> int:
    """``qkd teacher | search | distill | export | bench | report``: one stage."""
    return _run(_load(args), (args.name,), args)


def run_bench(args: argparse.Namespace) -> int:
    """``qkd bench``: the stage of a config; or ONNX files and run folders on devices, 1 where a device failed."""
    from qkd.device_bench import bench_models, names_models, refuse_options

    if not names_models([args.config]):
        refuse_options(args)
        return run_stage(args)
    table = bench_models(args, _progress())
    _print(args, table)
    if table.failures:
        return BAD_INPUT if table.is_input_fault else FAILED
    return DONE


def list_names(args: argparse.Namespace) -> int:
    """``qkd ls``: the names that a config may hold."""
    from qkd.listing import Listing, table

    names = TABLE_NAMES if args.table is None else (args.table,)
    return _print(args, Listing({name: table(name) for name in names}))


def show(args: argparse.Namespace) -> int:
    """``qkd show``: the resolved config as YAML, or JSON."""
    from qkd.config.binding import config_text

    config = _load(args)
    print(json.dumps(config.model_dump(mode="json")) if args.json else config_text(config), end="")
    return DONE


def validate(args: argparse.Namespace) -> int:
    """``qkd validate``: all faults at once; none is an answer, too."""
    config = _load(args, with_files=True)
    print(json.dumps({"name": config.name, "faults": []}) if args.json else f"{args.config}: no faults")
    return DONE


def cost(args: argparse.Namespace) -> int:
    """``qkd cost``: what a file, a run's student or a config's student costs."""
    from qkd.costing import CostTable, cost_of_target

    report = cost_of_target(args.config, runs_dir=args.runs_dir, overrides=args.overrides, load=lambda: _load(args))
    return _print(args, CostTable(report, has_layers=args.layers))


def diagnose(args: argparse.Namespace) -> int:
    """``qkd diagnose``: what a teacher tells, and which known failure of distillation it shows."""
    from qkd.diagnosing import diagnose_target

    options = {"limit": args.limit, "temperature": args.temperature, "out": args.out, "progress": _progress()}
    where = {"runs_dir": args.runs_dir, "overrides": args.overrides, "load": lambda: _load(args)}
    return _print(args, diagnose_target(args.config, **where, **options))


def retrieve(args: argparse.Namespace) -> int:
    """``qkd retrieve``: how well features of test images find training images of their class."""
    from qkd.retrieving import retrieve_target

    options = {"role": args.role, "tap": args.tap, "compat": args.compat, "limit": args.limit, "queries": args.queries}
    return _print(args, retrieve_target(args.run, runs_dir=args.runs_dir, progress=_progress(), **options))


def match(args: argparse.Namespace) -> int:
    """``qkd match``: which layer of the teacher each layer of the student is to follow."""
    from qkd.matching import match_target

    taps = {"student_taps": args.student_taps, "teacher_taps": args.teacher_taps}
    limit = {} if args.limit is None else {"limit": args.limit}
    return _print(args, match_target(args.run, runs_dir=args.runs_dir, progress=_progress(), **taps, **limit))


def doctor(args: argparse.Namespace) -> int:
    """``qkd doctor``: exit code 1 where another distribution sits on our names."""
    from qkd.doctor import diagnose

    report = diagnose()
    _print(args, report)
    return DONE if report.is_healthy else FAILED


def policy_import(args: argparse.Namespace) -> int:
    """``qkd policy import``: a published search log becomes a schedule file."""
    from qkd.policy_tools import import_policy

    options = {"epochs": args.epochs, "op_order": args.op_order, "trial": args.trial, "role": args.role}
    return _print(args, import_policy(args.log, args.out, **options))


def policy_show(args: argparse.Namespace) -> int:
    """``qkd policy show``: a schedule in words, and as a picture."""
    from qkd.policy_tools import show_policy

    return _print(args, show_policy(args.policy, epochs=args.epochs, out=args.out))


def policy_sample(args: argparse.Namespace) -> int:
    """``qkd policy sample``: a grid of augmented images."""
    from qkd.config import DataConfig
    from qkd.policy_tools import sample_policy

    where = {} if args.data_root is None else {"root": args.data_root}
    data = DataConfig(name=args.data, path=args.data_path, **where)
    options = {"epochs": args.epochs, "out": args.out, "seed": args.seed, "length": args.length}
    return _print(args, sample_policy(args.policy, data, **options))


def _run(config: RunConfig, names: Sequence[str], args: argparse.Namespace) -> int:
    from qkd.pipeline import run_stages
    from qkd.report import summarise
    from qkd.run.folder import RunFolder

    with RunFolder.open(config, runs_dir=args.runs_dir) as run:
        run_stages(run, names, _progress())
        if getattr(args, "strict", False):
            from qkd.stages.export import require_integer_layers

            require_integer_layers(run)
        return _print(args, summarise(run.path))


def _load(args: argparse.Namespace, *, with_files: bool = False) -> RunConfig:
    from qkd.config.binding import load_config
    from qkd.listing import name_faults
    from qkd.named_files import file_faults

    return load_config(args.config, args.overrides, checks=(name_faults, file_faults) if with_files else (name_faults,))


def _progress() -> Any:
    from qkd.progress import Progress

    return Progress()


def _print(args: argparse.Namespace, result: Any) -> int:
    print(json.dumps(result.to_json(), indent=2) if args.json else result.to_text())
    return DONE
