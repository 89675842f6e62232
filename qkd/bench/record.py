"""The record of each device, in the same format whether a stage or a command measured it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from export import Device, DeviceResult, Settings
from export.devices.providers import SHORT, provider_names
from qkd.bench.device_file import entry_of
from qkd.bench.targets import BASELINE, Targets
from qkd.config import BenchConfig
from qkd.files import sha256_of, write_json
from qkd.report.findings.measurements import SETTINGS, is_own, measured_others, records_in, unlike_settings
from qkd.units import counted

# one value for all models of a device
SHARED = ("machine", "threads", "affinity", "warmup", "rounds", "device", "spinning", "frequency_mhz",
          "temperature_c", "load", "images")  # fmt: skip

SCORES = ("accuracy", "agreement", "max_difference")
# key of a device's entry -> the setting that it replaces, unless an option of the command stands above it
OWN_SETTINGS = {"threads": "threads", "affinity": "affinity", "provider": "providers"}
NAMES = {"batch_size": "batch", "warmup": "warm-up", "providers": "provider"}  # of settings, in words

Record: TypeAlias = dict[str, Any]


def records_of(
    results: Iterable[DeviceResult], targets: Targets, settings: Settings, *, is_stage: bool = False
) -> tuple[Record, ...]:
    """Return the record of each device: how it was measured, one row per model and, if it failed, the reason.

    Args:
        results: One per device.
        targets: What was measured.
        settings: How, before a device's own values are put in.
        is_stage: Whether the stage of a run measured.
    """
    asked: Record = {name: _plain(getattr(settings, name)) for name in SETTINGS}
    asked |= {"providers": list(provider_names(settings.providers)), "int8_baseline": BASELINE in targets.paths}
    return tuple(_record(result, targets, asked, is_stage) for result in results)


def as_recorded(record: Record, bench: BenchConfig, devices: Sequence[Device], *, is_own_sample: bool) -> Record:
    """Return what a run keeps of a device that a command has measured.

    A measurement that the run's own stage would make counts as the stage's. Another one of the same device gets a name
    that says in what it differs: ``local (batch 64)``. Accuracies on images that are not the run's are left out.

    Args:
        record: Of :func:`records_of`.
        bench: The run's section.
        devices: The devices of that section; empty if its devices file cannot be read.
        is_own_sample: Whether the models were scored on the run's own images.
    """
    if not is_own_sample:
        rows = {name: {**row, **dict.fromkeys(SCORES)} for name, row in record["models"].items()}
        record = {**record, "images": 0, "models": rows}
    if record["device"] not in bench.on:
        return record
    plain = bench.model_dump(mode="json")
    apart = unlike_settings(record, plain)
    entry = next((entry_of(device) for device in devices if device.title == record["device"]), {})
    others = _unlike(entry, record["entry"])
    for key, setting in OWN_SETTINGS.items():
        if key not in others:
            continue
        used, own = (
            settings[setting] if one[key] is None else [one[key]] if key == "provider" else one[key]
            for settings, one in ((record["settings"], record["entry"]), (plain, entry))
        )
        if unlike_settings({"settings": {setting: used}}, {setting: own}):
            apart[setting] = used
        else:  # an option of the command that repeats the device's entry
            apart.pop(setting, None)
    unlike = [_words(*item) for item in apart.items()]
    unlike += [f"another {key}" for key in others if key not in OWN_SETTINGS]
    unlike += [] if is_own_sample else ["another sample"]
    if not unlike:
        return {**record, "stage": True}
    return {**record, "device": f"{record['device']} ({', '.join(unlike)})"}


def with_earlier(folder: Path, record: Record, bench: BenchConfig, paths: Mapping[str, Path]) -> Record:
    """Return the record of a device; if it failed, with what it measured earlier of the same files, in the same way.

    Args:
        folder: ``bench/`` of a run.
        record: Of :func:`records_of`, for the stage.
        bench: The run's section.
        paths: Name -> file, of what there is to measure now.
    """
    if record["models"]:
        return record
    hashes = {name: sha256_of(path) for name, path in paths.items()}
    for _, earlier in records_in(folder):
        rows = earlier.get("models")
        if earlier.get("device") != record["device"] or not isinstance(rows, dict) or not rows:
            continue
        known = {row.get("model", name) for name, row in rows.items() if isinstance(row, dict)}
        is_same = (
            is_own(earlier, bench.model_dump(mode="json"))
            and not _unlike(earlier.get("entry") or {}, record["entry"])
            and all(earlier.get(key) in (None, getattr(bench, key)) for key in ("rounds", "warmup"))
        )
        if is_same and known >= hashes.keys() - {BASELINE} and not measured_others(earlier, hashes):
            return {
                **earlier,
                "failure": f"{record['failure']}; the times of {record['device']} are from an earlier measurement",
            }
    return record


def keep_apart(folder: Path, then: Collection[str], now: Collection[str]) -> None:
    """Mark the records that a stage of an older version made of devices that the config no longer names.

    Args:
        folder: ``bench/`` of a run.
        then: Names of the devices that the stage last measured on.
        now: Those that it is to measure on.

    Raises:
        OSError: If a record cannot be written.
    """
    for path, record in list(records_in(folder)):
        if "stage" not in record and record.get("device") in set(then) - set(now):
            write_json(path, {**record, "stage": True})


def write_records(folder: Path, records: Sequence[Record]) -> dict[str, Path]:
    """Write ``<device>.json`` for each record; return name of the device -> file.

    A file of another device that would have the same name is kept.

    Args:
        folder: ``bench/`` of a run.
        records: Of :func:`records_of`.

    Raises:
        OSError: If one cannot be written.
    """
    names = file_names([record["device"] for record in records])
    owners, written = {path: record.get("device") for path, record in records_in(folder)}, {}
    for record in records:
        title = record["device"]
        path = folder / f"{names[title]}.json"
        if isinstance(owners.get(path), str) and owners[path] != title:
            path = folder / f"{names[title]}-{_mark(title)}.json"
        write_json(path, record)
        written[title] = path
    return written


def drop_stale(folder: Path, kept: Iterable[Path], paths: Mapping[str, Path]) -> list[str]:
    """Delete the records of devices that measured other files than these, as after a new export; return the devices.

    Args:
        folder: ``bench/`` of a run.
        kept: Files that are new.
        paths: Name -> file, of what there is to measure now.
    """
    now = {name: sha256_of(path) for name, path in paths.items()}
    dropped, new = [], set(kept)
    for path, record in list(records_in(folder)):
        if path not in new and measured_others(record, now):
            dropped.append(str(record.get("device") or path.stem))
            path.unlink()
    return dropped


def file_name(title: str) -> str:
    """Return a device's name as the stem of a file: ``ssh://pi@board:22`` is ``ssh-pi-board-22``."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", title).strip("-.")


def file_names(titles: Sequence[str]) -> dict[str, str]:
    """Return each device's name as the stem of a separate file: ``a/b`` and ``a-b`` have two.

    Args:
        titles: Names of devices, all different.
    """
    stems = {title: file_name(title) for title in titles}
    counts = Counter(stem.lower() for stem in stems.values())  # some file systems ignore case
    return {
        title: stem if stem and counts[stem.lower()] == 1 else f"{stem}-{_mark(title)}".strip("-")
        for title, stem in stems.items()
    }


def _record(result: DeviceResult, targets: Targets, asked: Record, is_stage: bool) -> Record:  # noqa: FBT001
    head: Record = {"device": result.device.title, "address": result.device.address, "failure": result.failure or None}
    head |= {"stage": is_stage, "settings": asked, "entry": entry_of(result.device)}
    if not result.reports:
        return {**head, "models": {}}
    rows = {name: report.to_json() for name, report in result.reports.items()}
    first = next(iter(rows.values()))
    reference = rows.get(targets.reference or "", {}).get("median_ms")
    models = {name: {key: value for key, value in row.items() if key not in SHARED} for name, row in rows.items()}
    for row in models.values():
        row["path"] = Path(row["path"]).name  # the folder may move
        row["to_float"] = row["median_ms"] / reference if reference else None
    shared = {key: first[key] for key in SHARED if key != "device"}
    return {**head, **shared, "batch_size": asked["batch_size"], "reference": targets.reference, "models": models}


def _words(key: str, value: Any) -> str:
    """Return a setting in words."""
    if key in ("threads", "rounds"):
        return counted(value, key[:-1])
    if key == "int8_baseline":
        return f"{'with' if value else 'without'} {BASELINE}"
    if key == "affinity":
        return f"CPUs {' '.join(map(str, value))}" if value else "not pinned"
    short = {name: word for word, name in SHORT.items()}
    shown = " ".join(str(short.get(one, one)) for one in value) if isinstance(value, list) else value
    return f"{NAMES[key]} {shown}"


def _unlike(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [key for key, value in then.items() if key in now and now[key] != value]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _mark(title: str) -> str:
    return hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest()[:8]
