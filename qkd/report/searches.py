"""The results of a population search in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qkd.units import percent

HEAD = ["agent", "rounds", "epochs", "found schedule", "best of the last round", "its mean", "best of the first round"]


@dataclass(frozen=True)
class SearchRecord:
    """The population search of a role's agent.

    Args:
        epochs: Reached at the end of each round.
        best: Highest validation accuracy of each round, fractions.
        mean: Mean of the round's members.
        chosen: Accuracy of the states that led to the found schedule.
        cost: Images read and time spent, in one line.
    """

    epochs: Sequence[int]
    best: Sequence[float]
    mean: Sequence[float]
    chosen: Sequence[float]
    cost: str


def search_table(searches: Mapping[str, SearchRecord]) -> list[list[str]]:
    """Return the heading and one line per search, as text: its length and validation accuracies.

    Args:
        searches: Role -> its search.
    """
    return [HEAD, *([role, str(len(one.epochs)), str(one.epochs[-1]), percent(one.chosen[-1]), percent(one.best[-1]),
                     percent(one.mean[-1]), percent(one.best[0])] for role, one in searches.items())]  # fmt: skip
