"""Read the logs of published population searches (PBA, role-kd) as schedules; nothing in them is executed or unpickled.

Each line is a record: a JSON array, or a Python literal, of ``[target, clone, target iteration, clone iteration, old,
new]``. ``old`` is the donor's policy, and ``new`` is the target's policy from then on: 60 integers, or a mapping with
them under ``hp_policy``. They are two copies of 15 operations with probability (0..10) and magnitude (0..9) each, in an
order that is not in the log: see ``ORDERS``.

References:
    Ho et al., arXiv 1905.05393 (PBA's ``schedules``); Fu et al., arXiv 2004.08861 (role-kd's ``results``).
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkd.agents.policies.policy import LEVELS, PBA_OPERATIONS, Op, Policy, Schedule, Segment
from qkd.files import refuse_pickle
from qkd.foreign.opening import read_regular

ORDERS = {
    # CPython 2.7's hash order of the dictionary, in which every published log was written.
    "py2": PBA_OPERATIONS,
    # The order of the released source; logs of that code under Python 3 have this order.
    "source": (
        "AutoContrast",
        "Equalize",
        "Invert",
        "Rotate",
        "Posterize",
        "Solarize",
        "Color",
        "Contrast",
        "Brightness",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Cutout",
    ),
}
COPIES = 2
INTEGERS = COPIES * len(PBA_OPERATIONS) * 2
PICKLES = (".p", ".pkl", ".pickle")
LONGEST_LINE = 1_000_000  # characters; a record has a few thousand of them


class SearchLogError(ValueError):
    """A log that cannot be read as a schedule; ``faults`` has a line for each fault, with its place in the file."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        super().__init__("\n".join(f"{path}: {fault}" for fault in faults))
        self.faults = tuple(faults)


@dataclass(frozen=True)
class Record:
    """A population member's copy of another's state.

    Args:
        line: Line of the file, from 1.
        target: The member that copies.
        clone: The donor.
        target_epoch: Epoch of the target.
        clone_epoch: Epoch of the donor, from which the target continues.
        old: The donor's policy, 60 integers.
        new: The target's policy from then on.
    """

    line: int
    target: str
    clone: str
    target_epoch: int
    clone_epoch: int
    old: tuple[int, ...]
    new: tuple[int, ...]


@dataclass(frozen=True)
class ImportedLog:
    """The result of reading a log.

    Args:
        schedule: Policies over the search's epochs.
        file: The log that was read (the best trial's, if ``best.txt`` was named).
        records: Number of lines used for the schedule.
        dropped: Number of stale lines at the beginning that were left out.
        lineage: Members from which the state came, in order; the trial itself is last.
        notes: Notes for the user.
    """

    schedule: Schedule
    file: Path
    records: int
    dropped: int
    lineage: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def import_log(path: Path, *, epochs: int, op_order: str, trial: str | None = None) -> ImportedLog:
    """Read a log as the schedule of one trial.

    Args:
        path: ``pbt_policy_<id>.txt``, ``pbt_global.txt`` (with ``trial``), or ``best.txt``, which names the best
            trial's log in its folder.
        epochs: Length of the search; the last policy lasts until its end. The published searches have 200.
        op_order: A key of ``ORDERS``.
        trial: The trial whose lineage to follow in a log of all trials.

    Raises:
        SearchLogError: If the file is missing, pickled, not such a log, truncated, or inconsistent; it has all faults.
        ValueError: If ``epochs`` or ``op_order`` is wrong.
    """
    if op_order not in ORDERS:
        raise ValueError(f"the order of operations must be one of {', '.join(ORDERS)}, got {op_order!r}")
    if epochs < 1:
        raise ValueError(f"epochs must be positive, got {epochs}")
    path = _of_best(Path(path))
    records = _records(path)
    if trial is not None:
        records = _lineage_of(path, records, trial)
    kept, dropped = _chain(path, records)
    segments = _segments(path, kept, epochs, ORDERS[op_order])
    lineage = (*(record.clone for record in kept), kept[-1].target)
    return ImportedLog(Schedule(segments), path, len(kept), dropped, lineage, _notes(kept, dropped))


def _of_best(path: Path) -> Path:
    """Return the log named in a ``best.txt``; return any other path unchanged."""
    if path.is_dir():
        path = path / "best.txt"
    if path.name != "best.txt":
        return path
    text = _text(path).strip()
    if not text.isdecimal():
        raise SearchLogError(path, [f"must contain only the number of the best trial, found {text[:40]!r}"])
    return path.parent / f"pbt_policy_{int(text)}.txt"


def _text(path: Path) -> str:
    if path.suffix in PICKLES:
        raise SearchLogError(
            path, ["is a pickle, which can run code when opened, and is refused; import the trial's .txt log instead"]
        )
    try:
        data = read_regular(path)
    except OSError as error:
        raise SearchLogError(path, [f"cannot be read: {error.strerror or error}"]) from error
    try:
        refuse_pickle(path, data)
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SearchLogError(
            path, [f"is not text ({error.reason} at byte {error.start}); is this a search log?"]
        ) from error
    except ValueError as error:
        raise SearchLogError(path, ["is a pickled file, which is never opened; import the trial's .txt log"]) from error


def _records(path: Path) -> list[Record]:
    lines = [(number, line) for number, line in enumerate(_text(path).splitlines(), 1) if line.strip()]
    if not lines:
        raise SearchLogError(path, ["has no records: a trial that never copied another's state has no log"])
    faults: list[str] = []
    made = [_record(line, number, faults, is_last=number == lines[-1][0]) for number, line in lines]
    if faults:
        raise SearchLogError(path, faults)
    return [record for record in made if record is not None]


def _record(line: str, number: int, faults: list[str], *, is_last: bool) -> Record | None:
    try:
        row = _literal(line)
    except ValueError:
        end = "; it is the last line: was the file cut off?" if is_last else ""
        faults.append(
            f"line {number}: neither JSON nor a plain Python literal, starts with {line[:40]!r}; no code was run{end}"
        )
        return None
    if not isinstance(row, (list, tuple)) or len(row) != 6:
        found = f"{len(row)} entries" if isinstance(row, (list, tuple)) else type(row).__name__
        faults.append(
            f"line {number}: needs [target, clone, target iteration, clone iteration, old, new], found {found}"
        )
        return None
    before = len(faults)
    tags = [
        _tag(value, f"line {number}, {name}", faults) for value, name in zip(row[:2], ("target", "clone"), strict=True)
    ]
    for value, name in zip(row[2:4], ("target iteration", "clone iteration"), strict=True):
        if not _is_whole(value) or value < 0:
            faults.append(f"line {number}, {name}: must be a whole number of epochs, got {value!r}")
    old, new = (_integers(row[place], f"line {number}, {name}", faults) for place, name in ((4, "old"), (5, "new")))
    return None if len(faults) > before else Record(number, tags[0], tags[1], row[2], row[3], old, new)


def _literal(line: str) -> Any:
    """Return the value of a line, JSON or a Python literal. Raises ValueError for anything else."""
    if len(line) > LONGEST_LINE:
        raise ValueError("too long")
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("not a literal") from error


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _tag(value: object, place: str, faults: list[str]) -> str:
    if not isinstance(value, str) and not _is_whole(value):
        faults.append(f"{place}: must be a trial's tag, got {value!r}")
    return str(value)


def _integers(value: object, place: str, faults: list[str]) -> tuple[int, ...]:
    if isinstance(value, dict):
        if "hp_policy" not in value:
            faults.append(f"{place}: has no hp_policy; keys: {', '.join(map(str, list(value)[:6]))}")
            return ()
        value = value["hp_policy"]
    if not isinstance(value, (list, tuple)) or len(value) != INTEGERS or not all(map(_is_whole, value)):
        found = f"{len(value)} values" if isinstance(value, (list, tuple)) else type(value).__name__
        faults.append(
            f"{place}: needs {INTEGERS} integers ({COPIES} x {len(PBA_OPERATIONS)} operations x 2), found {found}"
        )
        return ()
    for index, number in enumerate(value):
        name, most = ("magnitude", LEVELS - 1) if index % 2 else ("probability", 10)
        if not 0 <= number <= most:
            faults.append(f"{place}, integer {index}: {name} must be 0..{most}, got {number}")
    return tuple(value)


def _lineage_of(path: Path, records: list[Record], trial: str) -> list[Record]:
    """Return one trial's log from a log of all trials: a member that copies a state also inherits its history."""
    histories: dict[str, list[Record]] = {}
    for record in records:
        histories[record.target] = [*histories.get(record.clone, []), record]
    if trial not in histories:
        known = ", ".join(sorted(histories, key=lambda tag: (len(tag), tag)))
        raise SearchLogError(path, [f"has no record of trial {trial!r}; trials that copied a state: {known}"])
    return histories[trial]


def _chain(path: Path, records: list[Record]) -> tuple[list[Record], int]:
    """Leave out the stale beginning: all lines up to the last one whose target is not the donor of the next line."""
    breaks = [index for index in range(len(records) - 1) if records[index].target != records[index + 1].clone]
    if len(breaks) > len(records) // 2 and len(records) > 2:
        raise SearchLogError(
            path,
            [
                f"{len(breaks)} of {len(records)} lines do not continue the line before; this looks like a log of all "
                "trials (pbt_global.txt): choose the trial to follow with --trial"
            ],
        )
    first = breaks[-1] + 1 if breaks else 0
    return records[first:], first


def _segments(path: Path, records: list[Record], epochs: int, order: tuple[str, ...]) -> tuple[Segment, ...]:
    """Return the segments between copies, measured in the donors' epochs, since the donor's state is the one kept."""
    starts = [0, *(record.clone_epoch for record in records), epochs]
    policies = [records[0].old, *(record.new for record in records)]
    faults = [
        f"line {record.line}: epochs do not add up: continues at epoch {record.clone_epoch}, after {start}"
        for record, start in zip(records, starts, strict=False)
        if record.clone_epoch < start
    ]
    if records[-1].clone_epoch > epochs:
        faults.append(
            f"line {records[-1].line}: epochs do not add up: continues at epoch {records[-1].clone_epoch} of a search "
            f"of {epochs}; set the length of the search with --epochs"
        )
    if faults:
        raise SearchLogError(path, faults)
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    pairs = zip(lengths, policies, strict=True)
    return tuple(Segment(length, _policy(integers, order)) for length, integers in pairs if length)


def _policy(integers: tuple[int, ...], order: tuple[str, ...]) -> Policy:
    """Return the policy of 60 integers; operations with probability 0 are left out."""
    names = order * COPIES
    pairs = zip(integers[::2], integers[1::2], strict=True)
    ops = (Op(name, chance / 10, level) for name, (chance, level) in zip(names, pairs, strict=True) if chance)
    return Policy(tuple(ops))


def _notes(records: list[Record], dropped: int) -> tuple[str, ...]:
    notes = [f"{dropped} stale lines at the beginning were left out"] if dropped else []
    odd = [str(after.line) for before, after in zip(records, records[1:], strict=False) if before.new != after.old]
    if odd:
        notes.append(f"the donor's policy differs from its own record in lines {', '.join(odd)}; `new` was used")
    return tuple(notes)
