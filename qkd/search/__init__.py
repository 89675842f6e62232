"""Population-based search of augmentation schedules: members as values, their turns, and the engines."""

from qkd.search.board import SearchBoard
from qkd.search.cost import CostReport, cost_report, published_cost
from qkd.search.images import search_splits
from qkd.search.journal import Journal, Turn
from qkd.search.local import run_local
from qkd.search.outcome import write_search
from qkd.search.population import (
    Member,
    Score,
    SearchError,
    best_member,
    first_round,
    lineage,
    next_round,
    quantiles,
    schedule_of,
)
from qkd.search.space import explore, start_policy
from qkd.search.trial import Trial

__all__ = [
    "CostReport",
    "Journal",
    "Member",
    "Score",
    "SearchBoard",
    "SearchError",
    "Trial",
    "Turn",
    "best_member",
    "cost_report",
    "explore",
    "first_round",
    "lineage",
    "next_round",
    "published_cost",
    "quantiles",
    "run_local",
    "schedule_of",
    "search_splits",
    "start_policy",
    "write_search",
]
