"""Schedules in files: YAML with the operations by name, read with all faults at once, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qkd.agents.policies.policy import (
    Op,
    Policy,
    Schedule,
    Segment,
    epochs_fault,
    magnitude_fault,
    operation_fault,
    probability_fault,
)
from qkd.files import write_text
from qkd.files.yaml_text import read_yaml

FORMAT = "qkd-schedule"
VERSION = 1
ROLES = ("teacher", "student")
_KEYS = ("format", "version", "role", "provenance", "epochs", "segments")
_HEADER = "# Augmentation schedule: each op is [name, probability 0..1, magnitude 0..9].\n"


class _Flow(list[Any]):
    """A list that is written in brackets, so that a file that is cut off within it is not valid YAML."""


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with :class:`_Flow`."""


_Dumper.add_representer(
    _Flow, lambda dumper, rows: dumper.represent_sequence("tag:yaml.org,2002:seq", rows, flow_style=True)
)


class ScheduleError(ValueError):
    """A schedule file that cannot be used; ``faults`` holds one line each, with its place in the file."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        super().__init__("\n".join(f"{path}: {fault}" for fault in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class ScheduleFile:
    """The content of a schedule file.

    Args:
        schedule: Policies over the epochs.
        role: ``teacher``, ``student``, or None if the file does not say.
        provenance: Where it comes from: plain values by name.
    """

    schedule: Schedule
    role: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def load_schedule(path: Path) -> Schedule:
    """Return the schedule of a file.

    Args:
        path: The schedule file (YAML).

    Returns:
        The schedule only; :func:`read_schedule_file` also gives role and provenance.

    Raises:
        ScheduleError: As :func:`read_schedule_file`.
    """
    return read_schedule_file(path).schedule


def read_schedule_file(path: Path) -> ScheduleFile:
    """Read a schedule file.

    Args:
        path: The schedule file (YAML).

    Returns:
        The schedule, whose role it is, and where it came from.

    Raises:
        ScheduleError: If the file is missing, not YAML, of another format or version, or has a wrong value: all
            faults at once, each with its place.

    Example:
        >>> from qkd.agents import Op, Policy, Schedule, Segment, save_schedule
        >>> schedule = Schedule((Segment(5, Policy()), Segment(10, Policy((Op("Rotate", 0.5, 3),)))))
        >>> save_schedule(schedule, Path("teacher.schedule.yaml"), role="teacher")
        >>> found = read_schedule_file(Path("teacher.schedule.yaml"))
        >>> found.role, found.schedule == schedule
        ('teacher', True)
    """
    path = Path(path)
    try:
        data = read_yaml(path)
    except OSError as error:
        raise ScheduleError(path, [f"cannot be read: {error.strerror or error}"]) from error
    except ValueError as error:  # not UTF-8, not YAML, or a key repeated
        raise ScheduleError(path, str(error).splitlines()) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ScheduleError(path, [f"format: must be {FORMAT!r}, found {found!r}; is this a schedule file?"])
    if data.get("version") != VERSION or isinstance(data["version"], bool):
        raise ScheduleError(
            path, [f"version: must be {VERSION}, found {data.get('version')!r}; another toolkit's file?"]
        )
    faults: list[str] = []
    content = _content(data, faults)
    if faults or content is None:
        raise ScheduleError(path, faults)
    return content


def save_schedule(
    schedule: Schedule, path: Path, *, role: str | None = None, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write a schedule, whole or not at all; :func:`read_schedule_file` returns the same values.

    Args:
        schedule: What to write.
        path: Where to.
        role: ``teacher`` or ``student``.
        provenance: Plain values (text, numbers, lists, mappings with text keys) that say where it comes from.

    Raises:
        ValueError: If ``role`` is neither, or ``provenance`` holds anything but plain values.
        OSError: If the file cannot be written.
    """
    if role is not None and role not in ROLES:
        raise ValueError(f"role must be one of {ROLES}, got {role!r}")
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if role is not None:
        data["role"] = role
    if provenance:
        data["provenance"] = dict(provenance)
    data["epochs"] = schedule.epochs  # so that a file that is cut off after a segment is not a shorter schedule
    data["segments"] = [
        {"epochs": one.epochs, "ops": _Flow([op.name, float(op.probability), op.magnitude] for op in one.policy.ops)}
        for one in schedule.segments
    ]
    try:
        text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ValueError(f"provenance must hold plain values only: {error}") from error
    write_text(Path(path), _HEADER + text)


def _content(data: dict[str, Any], faults: list[str]) -> ScheduleFile | None:
    faults += [f"{key}: unknown key; known: {', '.join(_KEYS)}" for key in data if key not in _KEYS]
    role = data.get("role")
    if role is not None and role not in ROLES:
        faults.append(f"role: must be one of {', '.join(ROLES)}, got {role!r}")
    provenance = data.get("provenance") or {}
    if not isinstance(provenance, dict):
        faults.append(f"provenance: must be a group of keys, got {type(provenance).__name__}")
    rows = data.get("segments")
    if not isinstance(rows, list) or not rows:
        faults.append(f"segments: needs a list of at least one segment, got {rows!r}")
        return None
    segments = [_segment(row, f"segments[{index}]", faults) for index, row in enumerate(rows)]
    complete = [segment for segment in segments if segment is not None]
    total = sum(segment.epochs for segment in complete)
    stated = data.get("epochs")
    if not faults and stated is not None and (isinstance(stated, bool) or stated != total):
        faults.append(
            f"epochs: {stated!r}, but the segments add up to {total}: the file was cut off, or only one of the two "
            f"was edited"
        )
    return None if faults else ScheduleFile(Schedule(tuple(complete)), role, provenance)


def _segment(row: object, place: str, faults: list[str]) -> Segment | None:
    if not isinstance(row, dict):
        faults.append(f"{place}: needs the keys epochs and ops, got {row!r}")
        return None
    before = len(faults)
    faults += [f"{place}.{key}: unknown key; known: epochs, ops" for key in row if key not in ("epochs", "ops")]
    faults += [f"{place}.{key}: missing" for key in ("epochs", "ops") if key not in row]
    epochs, rows = row.get("epochs"), row.get("ops")
    fault = epochs_fault(epochs) if "epochs" in row else None
    if fault:
        faults.append(f"{place}.epochs: {fault}")
    if "ops" in row and not isinstance(rows, list):
        faults.append(f"{place}.ops: needs a list of [name, probability, magnitude], got {rows!r}")
    ops = [
        _op(one, f"{place}.ops[{index}]", faults) for index, one in enumerate(rows if isinstance(rows, list) else [])
    ]
    if len(faults) > before or not isinstance(epochs, int):
        return None
    return Segment(epochs, Policy(tuple(op for op in ops if op is not None)))


def _op(row: object, place: str, faults: list[str]) -> Op | None:
    if not isinstance(row, list) or len(row) != 3:
        faults.append(f"{place}: needs [name, probability, magnitude], got {row!r}")
        return None
    name, probability, magnitude = row
    checks = (operation_fault(name), probability_fault(probability), magnitude_fault(magnitude))
    found = [f"{place}: {fault}" for fault in checks if fault]
    faults += found
    return None if found else Op(name, float(probability), magnitude)
