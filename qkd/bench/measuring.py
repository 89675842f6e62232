"""Measure named models on named devices: ``qkd bench MODEL... --on DEVICE``."""

from __future__ import annotations

import argparse
import shlex
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export import Device, Settings, measure_devices
from export.devices.providers import RUNTIMES
from export.targets.table import ONNXRUNTIME
from qkd.bench.device_file import resolve_devices
from qkd.bench.record import as_recorded, drop_stale, records_of, write_records
from qkd.bench.samples import is_own_sample
from qkd.bench.table import BenchTable
from qkd.bench.targets import CALIBRATION_IMAGES, NO_FLOAT, Targets, find_targets, is_run, run_files, with_baseline
from qkd.config import BenchConfig
from qkd.failures import ConfigError, UsageError
from qkd.files import write_json
from qkd.progress import Progress
from qkd.report.findings.measurements import SETTINGS, is_own, replaced_record
from qkd.report.records import read_record
from qkd.run.folder import RunFolder


def names_models(targets: list[str]) -> bool:
    """Return whether the first argument is an ONNX file or a run folder, not a config."""
    first = Path(targets[0])
    return first.suffix == ".onnx" or is_run(first) or (first.is_dir() and (first / "config.yaml").is_file())


def refuse_options(args: argparse.Namespace) -> None:
    """Raise if an option was given for which a config has keys.

    Raises:
        UsageError: If so; says which key.
    """
    keys = {"on": "on", "devices": "devices", "int8_baseline": "int8_baseline", "timeout": "timeout_s"}
    keys |= {name: name for name in SETTINGS}
    given = [name for name in keys if getattr(args, name) not in (None, False)]
    if args.python is not None:
        raise UsageError(f"--python: {args.config} is a config: name the Python in a devices file (bench.devices=FILE)")
    if args.runtimes:
        raise UsageError(f"--runtime measures files: name them, or a run folder; {args.config} is a config")
    if given or args.sample or args.output:
        names = ", ".join(f"bench.{keys[name]}=..." for name in given)
        raise UsageError(
            f"{args.config} is a config, whose bench section says how to measure"
            f"{f': give {names}' if names else ''}; options are for ONNX files and run folders"
        )


def bench_models(
    args: argparse.Namespace, progress: Progress, *, calibration: Callable[[Path], npt.NDArray[np.float32]]
) -> BenchTable:
    """Measure what the arguments name; for a single run, record the devices in its folder.

    Args:
        args: ``config`` and ``overrides`` hold the models; the rest are options, None where not given.
        progress: Where to report.
        calibration: Returns training images of a run folder, for the int8 baseline.

    Raises:
        ConfigError: If a device is not known.
        UsageError: If a model is missing, the options cannot be combined, or the output folder does not exist.
        ValueError: If a setting is out of range.
    """
    devices = _devices(args)
    runtimes = _runtimes(args)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    settings = Settings(**given)
    names = [args.config, *args.overrides]
    targets = find_targets(names, args.sample, runtimes)
    with tempfile.TemporaryDirectory(prefix="qkd-bench-") as place:
        if args.int8_baseline and targets.reference is None:
            raise UsageError(NO_FLOAT)
        if args.int8_baseline:
            targets = with_baseline(targets, Path(place), _calibration(targets, progress, calibration))
        results = measure_devices(devices, targets.paths, settings, sample=targets.sample, say=progress.say)
        table = BenchTable(results, records_of(results, targets, settings), targets.reference)
    if args.output is not None:
        write_json(args.output, table.to_json())
        progress.say(f"written to {args.output}")
    if targets.computed:
        progress.say(
            f"agreement of {', '.join(targets.computed)}: with the file as computed here without optimizations, since "
            f"the sample holds no logits that are known to be its own"
        )
    if len(names) == 1 and is_run(Path(names[0])):
        _record(Path(names[0]), table, progress, args.sample)
    return table


def _runtimes(args: argparse.Namespace) -> tuple[str, ...]:
    """Add the named runtimes to the providers; return those other than ONNX Runtime."""
    words = [word.strip() for text in args.runtimes or () for word in text.split(",")]
    known = (ONNXRUNTIME, *RUNTIMES)
    if unknown := [word for word in words if word not in known]:
        raise UsageError(f"--runtime {unknown[0]}: not known; runtimes that can be measured here: {', '.join(known)}")
    if not words:
        return ()
    if args.providers is not None and ONNXRUNTIME not in words:
        raise UsageError("--provider is ONNX Runtime's: name onnxruntime with --runtime, too, or leave it out")
    own = (args.providers or ["cpu"]) if ONNXRUNTIME in words else []
    args.providers = [*own, *(word for word in words if word in RUNTIMES)]
    return tuple(word for word in words if word in RUNTIMES)


def _record(folder: Path, table: BenchTable, progress: Progress, sample: Path | None) -> None:
    """Write what devices measured into ``bench/`` of a run, where its next report finds it."""
    # a failure is shown and replaces no record; what was measured despite it is recorded
    measured = [{**record, "failure": None} for record in table.records if record["models"]]
    if not measured:
        return
    try:
        with RunFolder.reopen(folder) as run:
            was_complete, bench = run.is_complete("bench"), run.config.bench
            has_own_sample = is_own_sample(sample, folder)
            records = [as_recorded(one, bench, _own_devices(bench), is_own_sample=has_own_sample) for one in measured]
            written = write_records(run.folder("bench"), records)
            if was_complete:
                run.extend("bench", written.values())
            else:
                _complete_where_measured(run, written.values(), progress)
            has_own = run.config.federated is not None or (run.is_complete("bench") and not replaced_record(folder))
    except (OSError, ValueError) as error:
        progress.warn(f"measured, but not recorded in {folder}: {error}")
        return
    again, paths = shlex.quote(str(folder)), ", ".join(str(path) for path in written.values())
    shown = "" if run.config.federated is not None else f"; `qkd report {again}` shows it"
    progress.say(f"recorded in {paths}{shown}")
    if others := [title for title in written if title not in [one["device"] for one in measured]]:
        way = "" if has_own else f"; `qkd run {again} --until bench` makes that"
        progress.say(
            f"{', '.join(others)}: measured differently from what the bench section of the run's config says, so it "
            f"does not count as the run's own measurement{way}"
        )
    if not has_own_sample:
        progress.say("accuracy and agreement are not recorded: the images are not those of the run's sample")


def _own_devices(bench: BenchConfig) -> tuple[Device, ...]:
    """Return the devices of a run's config; none if its devices file cannot be read."""
    try:
        return resolve_devices(bench.on, bench.devices, timeout_s=bench.timeout_s)
    except (ConfigError, OSError):
        return ()


def _complete_where_measured(run: RunFolder, written: Collection[Path], progress: Progress) -> None:
    """Drop records of other files than the current ones; the rest may be all that the run's bench stage would make."""
    folder, files, own = run.folder("bench"), run_files(run.path), run.config.bench
    plain = own.model_dump(mode="json")
    for title in drop_stale(folder, written, files):
        progress.warn(f"{title} had measured other files than those of this export; its record is deleted")
    records = {path: read_record(path) for path in sorted(folder.glob("*.json"))}
    titles = {
        record.get("device")
        for record in records.values()
        if is_own(record, plain) and (record.get("failure") or files.keys() <= _models_of(record))
    }
    if titles.issuperset(own.on) and not own.int8_baseline:  # the stage keeps the baseline's file, a command does not
        run.complete("bench", records, files.values())


def _models_of(record: Mapping[str, Any]) -> set[str]:
    return {row.get("model", name) for name, row in record["models"].items()}


def _devices(args: argparse.Namespace) -> list[Device]:
    found = resolve_devices(args.on or ["local"], args.devices)
    own = {"timeout_s": args.timeout} if args.timeout is not None else {}
    # a command-line option overrides a device's own entry
    own |= {name: None for name in ("threads", "affinity") if getattr(args, name) is not None}
    own |= {"provider": None} if args.providers is not None else {}
    if args.python is None:
        return [replace(device, **own) for device in found]
    if all(device.is_local for device in found):
        raise UsageError("--python is for a device (--on ssh://..., adb://...); here, the toolkit's own Python is used")
    return [replace(device, **own, python=device.python if device.is_local else args.python) for device in found]


def _calibration(
    targets: Targets, progress: Progress, calibration: Callable[[Path], npt.NDArray[np.float32]]
) -> npt.NDArray[np.float32]:
    """Return training images of the run, or else the sample."""
    for folder in targets.runs.values():
        return calibration(folder)
    if targets.sample is None:
        raise UsageError("--int8-baseline needs images to calibrate on: give --sample FILE.npz, or a run folder")
    progress.warn("int8-static is calibrated on the sample it is scored on, which flatters its accuracy")
    return targets.sample.images[:CALIBRATION_IMAGES]
