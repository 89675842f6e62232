"""The record of each device, in the same format whether a stage or a command measured it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from export import DeviceResult
from qkd.bench.targets import Targets
from qkd.files import DamagedFileError, read_json, sha256_of, write_json
from qkd.report.records import measured_others

# one value for all models of a device
SHARED = ("machine", "threads", "affinity", "warmup", "rounds", "device", "spinning", "frequency_mhz",
          "temperature_c", "load", "images")  # fmt: skip

Record: TypeAlias = dict[str, Any]


def records_of(results: Iterable[DeviceResult], targets: Targets, *, batch_size: int) -> tuple[Record, ...]:
    """Return the record of each device: how it was measured, one row per model and, if it failed, the reason.

    Args:
        results: One per device.
        targets: What was measured; the files still exist.
        batch_size: Images per inference.
    """
    hashes = {str(path): sha256_of(path) for path in targets.paths.values()}
    return tuple(_record(result, targets, hashes, batch_size) for result in results)


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
    written = {}
    for record in records:
        title = record["device"]
        path = folder / f"{names[title]}.json"
        if path.exists() and _device_of(path) not in (title, None):
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
    dropped = []
    for path in sorted(set(folder.glob("*.json")) - set(kept)):
        if measured_others(_read(path), now):
            dropped.append(str(_device_of(path) or path.stem))
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


def _record(result: DeviceResult, targets: Targets, hashes: Mapping[str, str], batch_size: int) -> Record:
    head = {"device": result.device.title, "address": result.device.address, "failure": result.failure or None}
    if not result.reports:
        return {**head, "models": {}}
    rows = {name: report.to_json() for name, report in result.reports.items()}
    first = next(iter(rows.values()))
    reference = rows.get(targets.reference or "", {}).get("median_ms")
    models = {name: {key: value for key, value in row.items() if key not in SHARED} for name, row in rows.items()}
    for row in models.values():
        row["sha256"] = hashes[row["path"]]
        row["path"] = Path(row["path"]).name  # the folder may move
        row["to_float"] = row["median_ms"] / reference if reference else None
    shared = {key: first[key] for key in SHARED if key != "device"}
    return {**head, **shared, "batch_size": batch_size, "reference": targets.reference, "models": models}


def _device_of(path: Path) -> str | None:
    device = _read(path).get("device")
    return device if isinstance(device, str) else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        value = read_json(path)
    except DamagedFileError:
        return {}
    return value if isinstance(value, dict) else {}


def _mark(title: str) -> str:
    return hashlib.sha256(title.encode("utf-8", "surrogatepass")).hexdigest()[:8]
