r"""Score features by retrieval: are the images nearest to a query in a database of the query's class?

For a query with :math:`R` images of its class in the database, :math:`P_n` is their share among the first
:math:`n` that were found. The interpolated precision is :math:`\hat P_n = \max_{m \ge n} P_m`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from qkd.losses.checks import check_choice
from qkd.losses.stable import unit_rows

Metric = Literal["l2", "cosine"]
METRICS: tuple[Metric, ...] = ("l2", "cosine")
Compat = Literal["correct", "released"]
COMPATS: tuple[Compat, ...] = ("correct", "released")
TOP = 100  # rank of the second published figure
RELEASED_BATCH = 128  # queries that the released program processes at a time
BLOCK_VALUES = 2_000_000  # distances in memory at a time: 16 MB in float64, about 10x that with ranks and precisions


@dataclass(frozen=True)
class RetrievalScores:
    """Means over the queries, fractions in ``[0, 1]``.

    Args:
        map_11_point: Mean of :math:`\\hat P` at recall 0, 0.1, ... 1, as published.
        top_100: :math:`\\hat P` at rank 100 (or the last rank, if the database is smaller).
        average_precision: Mean of :math:`P` at the ranks of the query's own class, not interpolated.
    """

    map_11_point: float
    top_100: float
    average_precision: float

    def to_json(self) -> dict[str, float]:
        """Return the scores as plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def score_retrieval(
    database: Tensor,
    database_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    metric: Metric = "l2",
    compat: Compat = "correct",
    done: Callable[[int], object] = lambda queries: None,
) -> RetrievalScores:
    """Rank the database for every query, nearest first (ties: the earlier image), and score the ranks.

    Memory is bounded: queries are processed in blocks of at most 2 million distances (or one query).

    Args:
        database: Features, shape ``[images, ...]``, floating; flattened to rows.
        database_labels: int64, shape ``[images]``.
        queries: Shape ``[queries, ...]``.
        query_labels: Shape ``[queries]``.
        metric: ``l2`` or ``cosine``; a row of zeros has cosine 0 with every other row.
        compat: ``released`` scores like the published program: it processes 128 queries at a time, and raises
            precision to the largest one at later ranks only up to the 128th rank (fewer in a smaller last batch; later
            ranks are unchanged); and it takes the precision at a recall from the rank whose recall is nearest to it,
            not from the first rank that reaches it.
        done: Called after each block with the number of queries that were ranked in it.

    Raises:
        ValueError: If shapes do not match, features are not finite, a query's class is not in the database, or a name
            is unknown.

    References:
        Passalis, Tzelepi, Tefas, `Heterogeneous Knowledge Distillation using Information Flow Modeling
        <https://arxiv.org/abs/2005.00727>`_, 2020, the evaluation by retrieval.
    """
    check_choice("metric", metric, METRICS)
    check_choice("compat", compat, COMPATS)
    _check(database, database_labels, queries, query_labels)
    base, asked = _centered(database, queries) if metric == "l2" else (_unit(database), _unit(queries))
    sums = torch.zeros(3, dtype=torch.float64, device=base.device)
    for start, stop, ranks in _blocks(len(asked), len(base), compat):
        nearest = _order(base, asked[start:stop].double(), metric)
        relevance = database_labels[nearest] == query_labels[start:stop].unsqueeze(1)
        sums += _score_block(relevance, ranks).sum(1)
        done(stop - start)
    return RetrievalScores(*(sums / len(asked)).tolist())


def precisions(relevance: Tensor) -> Tensor:
    """Return the share of relevant images among the first 1, 2, ... of each row, float64, same shape.

    Args:
        relevance: Whether the image at each rank is of the query's class, bool, shape ``[queries, ranks]``.
    """
    ranks = torch.arange(1, relevance.shape[1] + 1, dtype=torch.float64, device=relevance.device)
    return relevance.cumsum(1) / ranks


def interpolated(precision: Tensor, ranks: int | None = None) -> Tensor:
    """Return precision raised to the largest one at the same or a later rank, in the same shape.

    Args:
        precision: Shape ``[queries, ranks]``.
        ranks: How many ranks to raise, to the largest precision up to the rank after them; later ranks are unchanged
            and ignored (the released program's loop ends there). Default: all.
    """
    end = precision.shape[1] if ranks is None else ranks + 1
    raised = precision[:, :end].flip(1).cummax(1).values.flip(1)
    return torch.cat([raised, precision[:, end:]], dim=1)


def eleven_point(relevance: Tensor, precision: Tensor) -> Tensor:
    """Return the mean precision at recall 0, 0.1, ... 1 of each query, shape ``[queries]``.

    The precision at a recall is the one at the first rank that reaches it; recall 0 is reached at rank 1.

    Args:
        relevance: bool, shape ``[queries, ranks]``, at least one true in each row.
        precision: Interpolated, same shape.
    """
    hits = relevance.cumsum(1)
    # in whole images: 3 * 0.1 is more than 0.3 in floating point
    needed = (torch.arange(11, device=hits.device) * hits[:, -1:] + 9) // 10
    return precision.gather(1, torch.searchsorted(hits, needed)).mean(1)


def nearest_eleven_point(relevance: Tensor, precision: Tensor) -> Tensor:
    """Return :func:`eleven_point` as in the released program: at the first rank whose recall is nearest.

    Args:
        relevance: bool, shape ``[queries, ranks]``, at least one true in each row.
        precision: Same shape.
    """
    recall = relevance.cumsum(1).double() / relevance.sum(1, keepdim=True)
    ranks = [(recall - 0.1 * tenth).abs().argmin(1, keepdim=True) for tenth in range(11)]
    return precision.gather(1, torch.cat(ranks, dim=1)).mean(1)


def _score_block(relevance: Tensor, ranks: int | None) -> Tensor:
    precision = precisions(relevance)
    raised = interpolated(precision, ranks)
    exact = (precision * relevance).sum(1) / relevance.sum(1)
    at_recalls = eleven_point if ranks is None else nearest_eleven_point
    return torch.stack([at_recalls(relevance, raised), raised[:, min(TOP, raised.shape[1]) - 1], exact])


def _blocks(queries: int, images: int, compat: Compat) -> Iterator[tuple[int, int, int | None]]:
    """Yield first and last query of each block, and how many ranks are interpolated in it."""
    held = max(1, BLOCK_VALUES // images)
    step = queries if compat == "correct" else RELEASED_BATCH
    for batch in range(0, queries, step):
        end = min(batch + step, queries)
        ranks = None if compat == "correct" else end - batch - 1
        for start in range(batch, end, held):
            yield start, min(start + held, end), ranks


def _order(base: Tensor, asked: Tensor, metric: Metric) -> Tensor:
    """Return positions in the database, nearest first, ``[queries, images]``."""
    products = torch.empty(len(asked), len(base), dtype=torch.float64, device=base.device)
    rows = max(1, BLOCK_VALUES // base.shape[1])  # of the database widened to float64 at a time
    for start in range(0, len(base), rows):
        part = base[start : start + rows].double()
        block = asked @ part.T
        products[:, start : start + rows] = block if metric == "cosine" else 2 * block - part.square().sum(1)
    return products.sort(dim=1, descending=True, stable=True).indices


def _centered(database: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as rows with the database's mean at the origin: same distances, with less cancellation in squares."""
    rows = database.flatten(1)
    center = rows.double().mean(0).to(rows.dtype)
    return rows - center, queries.flatten(1) - center


def _unit(features: Tensor) -> Tensor:
    return unit_rows(features.flatten(1))


def _check(database: Tensor, database_labels: Tensor, queries: Tensor, query_labels: Tensor) -> None:
    for name, rows, labels in (("database", database, database_labels), ("queries", queries, query_labels)):
        if rows.dim() < 2 or len(rows) == 0 or labels.shape != rows.shape[:1]:
            raise ValueError(
                f"{name} needs features [images, ...] and as many labels, at least one, "
                f"got {tuple(rows.shape)} and {tuple(labels.shape)}"
            )
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"features of the {name} are not all finite; was the net trained?")
    if database.flatten(1).shape[1] != queries.flatten(1).shape[1]:
        raise ValueError(
            f"features of database and queries must have one size, "
            f"got {tuple(database.shape[1:])} and {tuple(queries.shape[1:])}"
        )
    foreign = sorted(set(query_labels.tolist()) - set(database_labels.tolist()))
    if foreign:
        raise ValueError(f"the database has no images of the queries' classes {foreign[:10]}, so none could be found")
