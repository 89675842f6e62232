"""Which measurements of a run are those that its config makes, which are shown, and under what conditions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.devices.connections.address import LOCAL
from export.devices.providers import provider_names
from qkd.config.binding import read_config
from qkd.files import DamagedFileError, read_json
from qkd.moved import in_new_spelling
from qkd.units import counted

SETTINGS = ("threads", "rounds", "warmup", "providers", "affinity", "batch_size")  # of a measurement, as in a config


@dataclass(frozen=True)
class Measurements:
    """What the devices of a run measured.

    Args:
        own: Records that the config's bench section makes, in its order.
        others: Further records, such as those of devices that were added later; this machine first.
        outdated: Records of files of an earlier export.
    """

    own: tuple[Mapping[str, Any], ...] = ()
    others: tuple[Mapping[str, Any], ...] = ()
    outdated: tuple[Mapping[str, Any], ...] = ()

    @property
    def leading(self) -> Mapping[str, Any]:
        """The record whose figures stand for the run; empty if there is none."""
        return next((one for one in self.own if one.get("models")), {})


def sort_out(records: Sequence[Mapping[str, Any]], path: Path, hashes: Mapping[str, str | None]) -> Measurements:
    """Return the records of a run's devices; those that the config no longer asks for are left out.

    Args:
        records: Contents of the files of ``bench/``, each with its ``device``; this machine's first.
        path: The run folder.
        hashes: Name of a model -> SHA-256 of its current file; None if unknown.
    """
    bench = bench_section(path)
    found = [one for one in records if not is_dropped(one, bench)]
    outdated = [one for one in found if measured_others(one, hashes)]
    current = [one for one in found if one not in outdated]
    own = [one for one in current if is_own(one, bench)]
    order = {title: place for place, title in enumerate(_on(bench))}
    own.sort(key=lambda one: order.get(str(one["device"]), len(order)))
    return Measurements(tuple(own), tuple(one for one in current if one not in own), tuple(outdated))


def measured_others(record: Mapping[str, Any], hashes: Mapping[str, str | None]) -> bool:
    """Return whether a device's record is of other files than the current ones, as after a new export.

    Args:
        record: Content of a file of ``bench/``, however damaged.
        hashes: Name of a model -> SHA-256 of its current file; None if unknown.
    """
    models = record.get("models")
    rows = models.items() if isinstance(models, dict) else ()
    # A model has a row for each provider.
    then = [(str(row.get("model", name)), row.get("sha256")) for name, row in rows if isinstance(row, dict)]
    pairs = [(old, hashes.get(name)) for name, old in then]
    return any(None not in pair and pair[0] != pair[1] for pair in pairs)


def bench_section(path: Path) -> Mapping[str, Any]:
    """Return the bench section of a run's config; empty if there is none, or the config cannot be read.

    Args:
        path: The run folder.
    """
    try:
        config = in_new_spelling(read_config(path / "config.yaml"), is_stored=True)
    except (OSError, ValueError):  # what lists runs says what is wrong with it
        return {}
    section = config.get("bench") if isinstance(config, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def is_own(record: Mapping[str, Any], bench: Mapping[str, Any]) -> bool:
    """Return whether a record is one that a bench section makes: of a device that it names, with its settings.

    Records of older versions do not hold the settings: batch and threads are compared.

    Args:
        record: Content of a file of ``bench/``.
        bench: The section as plain data; if it is empty, every record is.
    """
    if not bench:
        return True
    return record.get("device") in _on(bench) and not unlike_settings(record, bench)


def unlike_settings(record: Mapping[str, Any], bench: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in which a record differs from a bench section: name -> the record's value.

    Args:
        record: Content of a file of ``bench/``.
        bench: The section as plain data; keys that only one side has are ignored.
    """
    then = record.get("settings")
    if not isinstance(then, Mapping):
        then = {"batch_size": record.get("batch_size")}
        if record.get("address", LOCAL) == record.get("device"):  # one with a name may have its own threads
            then |= {"threads": record.get("threads")}
        then = {key: value for key, value in then.items() if value is not None}
    return {key: value for key, value in then.items() if key in bench and _plain(key, value) != _plain(key, bench[key])}


def is_dropped(record: Mapping[str, Any], bench: Mapping[str, Any]) -> bool:
    """Return whether a record was made by the stage for a device that the config no longer names.

    Args:
        record: Content of a file of ``bench/``; what a command added is never dropped.
        bench: The bench section as plain data; empty if unknown.
    """
    is_stages = record.get("stage", bool(record.get("failure")) and not record.get("models"))
    return bool(bench) and bool(is_stages) and record.get("device") not in _on(bench)


def records_in(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the records of devices with their files; damaged ones are left out: the report says what is wrong.

    Args:
        folder: ``bench/`` of a run; it need not exist.
    """
    for file in sorted(folder.glob("*.json")):
        try:
            record = read_json(file)
        except (DamagedFileError, OSError):
            continue
        if isinstance(record, Mapping):
            yield file, record


def failed_devices(path: Path) -> Iterator[str]:
    """Yield a sentence for each device that a run's config names and that failed when it was to be measured.

    Args:
        path: The run folder.
    """
    named = _on(bench_section(path))
    for file, record in records_in(path / "bench"):
        if record.get("failure") and record.get("device") in named:
            yield failure_line(record, file)


def failure_line(record: Mapping[str, Any], file: Path) -> str:
    """Return what to say of a device that failed.

    Args:
        record: Its record, with a ``failure``.
        file: The record's file.
    """
    kept = "; it holds earlier times" if record.get("models") else ""
    return f"{record['device']} failed: {record['failure']} (delete {file} to try again{kept})"


def replaced_record(path: Path) -> str:
    """Return which record a command of an older version has put in place of the stage's; empty if none.

    Args:
        path: The run folder.
    """
    bench = bench_section(path)
    for file, record in records_in(path / "bench"):
        if record.get("models") and record.get("device") in _on(bench) and not is_own(record, bench):
            return f"{file.relative_to(path)} was measured with other settings than the config's"
    return ""


def label(record: Mapping[str, Any]) -> str:
    """Return what a figure must say of its device and batch; empty for one image on this machine."""
    device, batch = record.get("device", LOCAL), record.get("batch_size") or 1
    return ", ".join([*([str(device)] if device != LOCAL else []), *([f"batch {batch}"] if batch != 1 else [])])


def conditions(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how devices measured: one sentence if all did alike, else one for each, with its name.

    Args:
        records: Those of the devices; those that measured nothing are left out.
    """
    told = {str(one["device"]): _condition(one) for one in records if one.get("models")}
    if len(set(told.values())) == 1:
        return [next(iter(told.values()))]
    return [f"{device}: {sentence}" for device, sentence in told.items()]


def _condition(record: Mapping[str, Any]) -> str:
    known = {"cpu": "unknown", **dict.fromkeys(("onnxruntime", "threads", "batch_size", "rounds", "warmup"), "?")}
    facts = known | {key: record[key] for key in known if record.get(key) is not None}
    facts |= {key: value for key, value in (record.get("machine") or {}).items() if key in known}
    pinned = f" on CPUs {', '.join(map(str, record['affinity']))}" if record.get("affinity") else ""
    return (
        f"{facts['cpu']}, {counted(facts['threads'], 'thread')}{pinned}, batch {facts['batch_size']}, "
        f"{counted(facts['rounds'], 'round')} of all files, interleaved, "
        f"after {facts['warmup']} of warm-up, ONNX Runtime {facts['onnxruntime']}."
    )


def _on(bench: Mapping[str, Any]) -> list[Any]:
    return list(bench.get("on") or [LOCAL])


def _plain(key: str, value: Any) -> Any:
    if key == "providers":
        try:
            return list(provider_names([value] if isinstance(value, str) else list(value)))
        except (TypeError, ValueError):
            return value
    return list(value) if isinstance(value, list | tuple) else value
