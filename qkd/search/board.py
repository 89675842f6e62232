"""The population as the user sees it during a search: scores, lineage, time left."""

from __future__ import annotations

import time

from qkd.progress import Board, duration
from qkd.search.journal import Journal
from qkd.search.population import Round, finalists_of, lineage

ANCESTORS_SHOWN = 8


class SearchBoard:
    """Shows a search on a board.

    Args:
        board: Where to show it.
        role: The role whose agent is searched.
        members: Size of the population.
    """

    def __init__(self, board: Board, role: str, members: int) -> None:
        self._board, self._role, self._members = board, role, members
        self._started = time.monotonic()
        self._at_start: int | None = None
        self._round = -1

    def show(self, journal: Journal) -> None:
        """Show how far a search has come."""
        done = turns_done(journal)
        if self._at_start is None:
            self._at_start = done
        is_news = journal.number != self._round or journal.is_done
        self._round = journal.number
        self._board.show(self._headline(journal, done), table(journal), is_news=is_news)

    def _headline(self, journal: Journal, done: int) -> str:
        whole = turns_in_all(journal, self._members)
        parts = [
            f"{self._role}'s search: turn {done}/{whole}",
            f"epoch {sum(journal.lengths[: journal.number])}/{journal.epochs}",
        ]
        scored = scores(journal.rounds[-1]) or (scores(journal.rounds[-2]) if journal.number else [])
        if scored:
            parts.append(f"best {100 * max(scored):.2f} %, mean {100 * sum(scored) / len(scored):.2f} %")
        elapsed, taken = time.monotonic() - self._started, done - (self._at_start or 0)
        if taken and done < whole:
            parts.append(f"{duration(elapsed / taken * (whole - done))} left")
        return ", ".join(parts)


def turns_done(journal: Journal) -> int:
    """Return how many turns have been taken, over all rounds."""
    return sum(member.score is not None for population in journal.rounds for member in population)


def turns_in_all(journal: Journal, members: int) -> int:
    """Return how many turns a search takes; in the last round, only the top quarter takes one."""
    return (len(journal.lengths) - 1) * members + finalists_of(members, len(journal.lengths))


def scores(population: Round) -> list[float]:
    """Return the accuracies known so far in a round, as fractions."""
    return [member.score.accuracy for member in population if member.score is not None]


def table(journal: Journal) -> list[str]:
    """Return one line per member: its epoch, its accuracy (and the last round's), and where its state comes from."""
    lines = ["member  epoch  accuracy  before  lineage"]
    for member in journal.rounds[-1]:
        line = lineage(journal.rounds, member.index)
        before = journal.rounds[-2][member.source].score if journal.number else None
        epoch = sum(journal.lengths[: journal.number + (member.score is not None)])
        now = member.score.accuracy if member.score is not None else None
        origin = " > ".join(str(one.index) for one in line[-ANCESTORS_SHOWN:])
        more = "... > " if len(line) > ANCESTORS_SHOWN else ""
        mark = " (diverged)" if member.score is not None and member.score.is_diverged else ""
        mark = " (rests)" if member.rests and member.score is None else mark
        lines.append(
            f"{member.index:>6}  {epoch:>5}  {_percent(now):>8}  {_percent(before.accuracy if before else None):>6}  "
            f"{more}{origin}{mark}"
        )
    return lines


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
