"""The engine in one process: members take turns, one after another."""

from __future__ import annotations

from qkd.search.board import SearchBoard
from qkd.search.journal import Journal
from qkd.search.trial import Trial


def run_local(journal: Journal, trial: Trial, board: SearchBoard) -> None:
    """Take all open turns of the journal, until the search ends.

    Args:
        journal: The search so far.
        trial: What the members share.
        board: Shows the population after each turn.

    Raises:
        SearchError: If the whole population diverges.
        OSError: If a state or the journal cannot be written.
    """
    board.show(journal)
    while turns := journal.turns():
        for turn in turns:
            journal.record(turn.member, trial.take(turn))
            board.show(journal)
