"""The record of a search: rounds and scores in one JSON file, members' states in separate files.

``journal.json`` is rewritten as a whole after every member's turn, and holds a SHA-256 of itself and of every state in
use. A turn depends only on the journal, the states and the seed, so a search that was killed continues as if nothing
had happened. Only the states of the current round and of the one before it are kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qkd.agents import Op, Policy, Schedule, Segment
from qkd.files import (
    DamagedFileError,
    delete_file,
    make_folder,
    read_json,
    remove_unfinished,
    write_json,
)
from qkd.search.population import (
    ROUNDS_FOR_A_FINAL,
    Member,
    Round,
    Score,
    first_round,
    last_round,
    lineage,
    next_round,
    round_lengths,
    schedule_of,
    waiting,
    with_score,
)

FORMAT = 1  # increase it when the meaning of the files changes
_NEWER = ("method",)  # inputs that earlier versions did not record
_STATE = re.compile(r"round-(\d{4,})-member-(\d{2,})\.safetensors")


@dataclass(frozen=True)
class Turn:
    """What a member does next.

    Args:
        number: Number of the round, from 0.
        member: Index of the member.
        first_epoch: First epoch to train, from 0.
        epochs: How many epochs it trains.
        schedule: Its agent's schedule over the whole search: the past of the state it continues from, then its policy.
        source: The state that it continues from, and its SHA-256; None at the start of the search.
        own: Its own last state, which differs from ``source`` if it copies, and its SHA-256.
        result: Where to write its new state.
    """

    number: int
    member: int
    first_epoch: int
    epochs: int
    schedule: Schedule
    source: tuple[Path, str] | None
    own: tuple[Path, str] | None
    result: Path

    def to_json(self) -> dict[str, Any]:
        """Return the turn as plain data, for a remote worker."""
        return {
            **{name: getattr(self, name) for name in ("number", "member", "first_epoch", "epochs")},
            "schedule": [[segment.epochs, policy_rows(segment.policy)] for segment in self.schedule.segments],
            "source": _plain_file(self.source),
            "own": _plain_file(self.own),
            "result": str(self.result),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Turn:
        """Return the turn that :meth:`to_json` described."""
        segments = tuple(
            Segment(epochs, Policy(tuple(Op(*row) for row in rows))) for epochs, rows in values["schedule"]
        )
        return cls(
            number=values["number"],
            member=values["member"],
            first_epoch=values["first_epoch"],
            epochs=values["epochs"],
            schedule=Schedule(segments),
            source=_file(values["source"]),
            own=_file(values["own"]),
            result=Path(values["result"]),
        )


class Journal:
    """The journal of a search in its folder; opens an existing one or starts a new one.

    Args:
        folder: The folder of one role's search; created if missing.
        role: ``teacher`` or ``student``.
        seed: The run's seed.
        members: Size of the population.
        epochs: Length of the search.
        interval_epochs: Epochs between two perturbations.
        fingerprint: Name -> hash of each input of the search; a journal with other inputs is refused.

    Raises:
        DamagedFileError: If the journal has been altered.
        ValueError: If it has other inputs or another format.
        OSError: If it cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        role: str,
        seed: int,
        members: int,
        epochs: int,
        interval_epochs: int,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.folder, self.role, self.seed = make_folder(folder), role, seed
        self.lengths = round_lengths(epochs, interval_epochs)
        self.fingerprint = dict(fingerprint)
        self.file = folder / "journal.json"
        self.rounds: list[Round] = self._read() if self.file.exists() else [first_round(members)]
        remove_unfinished([folder])
        self._settle()

    @property
    def number(self) -> int:
        """Number of the current round, or of the last one, from 0."""
        return len(self.rounds) - 1

    @property
    def epochs(self) -> int:
        """Length of the search."""
        return sum(self.lengths)

    @property
    def is_done(self) -> bool:
        """Whether every member has reached the last epoch and has been scored."""
        return len(self.rounds) == len(self.lengths) and not self._open()

    def turns(self) -> list[Turn]:
        """Return the open turns of the current round; empty once the search is done."""
        return [self._turn(index) for index in self._open()]

    def record(self, index: int, score: Score) -> None:
        """Record the outcome of a member's turn; after the last one of the round, exploit and explore.

        Raises:
            ValueError: If the whole population has diverged.
            OSError: If the journal cannot be written.
        """
        self.rounds[-1] = with_score(self.rounds[-1], index, score)
        self._write()
        self._settle()

    def schedule(self, index: int) -> Schedule:
        """Return the schedule that a member of the last round has gone through so far."""
        return schedule_of(lineage(self.rounds, index), self.lengths[: len(self.rounds)])

    def state(self, number: int, index: int) -> Path:
        """Return the path of a member's state after a round."""
        return self.folder / f"round-{number:04}-member-{index:02}.safetensors"

    def discard_states(self) -> None:
        """Delete all states but keep the journal."""
        for path in self._states():
            delete_file(path)

    def _open(self) -> list[int]:
        return waiting(self.rounds[-1])

    def _settle(self) -> None:
        """Begin the next round if the current one is complete, and delete the states that are no longer needed."""
        if not self._open() and len(self.rounds) < len(self.lengths):
            rounds = len(self.lengths)
            is_last = len(self.rounds) == rounds - 1 and rounds >= ROUNDS_FOR_A_FINAL
            done, number = self.rounds[-1], self.number
            following = last_round(done) if is_last else next_round(done, seed=self.seed, role=self.role, number=number)
            self.rounds.append(following)
            self._write()
        for path in self._states():
            match = _STATE.fullmatch(path.name)
            if match and int(match.group(1)) not in (self.number, self.number - 1):
                delete_file(path)

    def _turn(self, index: int) -> Turn:
        number, member = self.number, self.rounds[-1][index]
        first_epoch = sum(self.lengths[:number])
        line = lineage(self.rounds, index)
        past = schedule_of(line[:-1], self.lengths[:number]).segments if number else ()
        rest = Segment(self.epochs - first_epoch, member.policy)
        return Turn(
            number,
            index,
            first_epoch,
            self.lengths[number],
            Schedule((*past, rest)),
            self._kept(member.source),
            self._kept(index),
            self.state(number, index),
        )

    def _kept(self, index: int) -> tuple[Path, str] | None:
        if self.number == 0:
            return None
        score = self.rounds[-2][index].score
        if score is None or not score.state_sha256:
            return None
        return self.state(self.number - 1, index), score.state_sha256

    def _states(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _STATE.fullmatch(path.name)]

    def _write(self) -> None:
        body = {
            "format": FORMAT,
            "role": self.role,
            "seed": self.seed,
            "lengths": list(self.lengths),
            "fingerprint": self.fingerprint,
            "rounds": [[_plain(member) for member in one] for one in self.rounds],
        }
        write_json(self.file, {**body, "sha256": _digest(body)})

    def _read(self) -> list[Round]:
        body = read_json(self.file)
        if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
            raise DamagedFileError(
                f"{self.file}: truncated or altered: its SHA-256 does not match; delete {self.folder} to search again"
            )
        if body["format"] != FORMAT:
            raise ValueError(
                f"{self.file}: journal format {body['format']}, this version reads {FORMAT}; continue with the version "
                f"that wrote it, or delete {self.folder} to search again"
            )
        now = {"role": self.role, "seed": self.seed, "lengths": list(self.lengths), **self.fingerprint}
        then = {"role": body["role"], "seed": body["seed"], "lengths": body["lengths"], **body["fingerprint"]}
        names = {name for name in now.keys() | then.keys() if name in then or name not in _NEWER}
        changed = sorted(name for name in names if now.get(name) != then.get(name))
        if changed:
            raise ValueError(
                f"{self.file}: the search was started with other inputs ({', '.join(changed)} changed since); restore "
                f"them, or delete {self.folder} to search again"
            )
        return [tuple(_member(row) for row in one) for one in body["rounds"]]


def policy_rows(policy: Policy) -> list[list[Any]]:
    """Return a policy as plain data: ``[name, probability, magnitude]`` of each operation."""
    return [[op.name, op.probability, op.magnitude] for op in policy.ops]


def _plain_file(file: tuple[Path, str] | None) -> list[str] | None:
    return None if file is None else [str(file[0]), file[1]]


def _file(value: Sequence[str] | None) -> tuple[Path, str] | None:
    return None if value is None else (Path(value[0]), value[1])


def _plain(member: Member) -> dict[str, Any]:
    score = asdict(member.score) if member.score is not None else None
    return {
        "index": member.index,
        "source": member.source,
        "rests": member.rests,
        "policy": policy_rows(member.policy),
        "score": score,
    }


def _member(row: Mapping[str, Any]) -> Member:
    policy = Policy(tuple(Op(*op) for op in row["policy"]))
    return Member(row["index"], policy, row["source"], Score(**row["score"]) if row["score"] else None, row["rests"])


def _digest(body: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("utf-8")).hexdigest()
