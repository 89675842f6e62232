"""Retrieval scores: ranks counted by hand, scikit-learn's average precision, the released program's ranks, memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from qkd.analysis import retrieval
from qkd.analysis.retrieval import (
    RetrievalScores,
    eleven_point,
    interpolated,
    nearest_eleven_point,
    precisions,
    score_retrieval,
)


def rows(count: int, size: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def on_a_line(relevant: list[int]) -> RetrievalScores:
    """Return the scores of one query at 0 whose neighbors at 1, 2, ... are of its class where marked."""
    database = torch.arange(1, len(relevant) + 1).float().unsqueeze(1)
    return score_retrieval(database, torch.tensor(relevant), torch.zeros(1, 1), torch.tensor([1]))


def test_worked_by_hand() -> None:
    # hits at ranks 1, 3, 6: precision 1, 2/3, 3/6; recall 1/3, 2/3, 1
    scores = on_a_line([1, 0, 1, 0, 0, 1])
    # recall 0 to 0.3 by the first hit, 0.4 to 0.6 by the second, 0.7 to 1 by the third
    assert scores.map_11_point == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 0.5) / 11)
    assert scores.top_100 == pytest.approx(0.5)  # six images only: the last rank
    assert scores.average_precision == pytest.approx((1 + 2 / 3 + 0.5) / 3)


def test_interpolation_lifts_what_lies_before_a_better_rank() -> None:
    # hits at 2 and 3: precision 0, 1/2, 2/3
    relevance = torch.tensor([[False, True, True]])
    assert precisions(relevance).tolist() == [[0.0, 0.5, 2 / 3]]
    assert interpolated(precisions(relevance)).tolist() == [[2 / 3] * 3]
    # only rank 1 is lifted, by rank 2 alone: the released loop begins there
    assert interpolated(precisions(relevance), 1).tolist() == [[0.5, 0.5, 2 / 3]]
    assert on_a_line([0, 1, 1]).map_11_point == pytest.approx(2 / 3)


def test_the_nearest_recall_of_the_released_program() -> None:
    # hits at 2 and 3: recall 0, 1/2, 1. Levels 0 to 0.2 are nearest to 0, 0.3 to 0.7 to 1/2, 0.8 to 1 to 1
    relevance = torch.tensor([[False, True, True]])
    precision = precisions(relevance)
    assert nearest_eleven_point(relevance, precision).item() == pytest.approx((3 * 0 + 5 * 0.5 + 3 * 2 / 3) / 11)
    # the first rank that reaches a recall: 0 at rank 1, 0.1 to 0.5 at rank 2, 0.6 to 1 at rank 3
    assert eleven_point(relevance, precision).item() == pytest.approx((0 + 5 * 0.5 + 5 * 2 / 3) / 11)


def test_recall_levels_are_counted_in_whole_images() -> None:
    # 10 of the class: level k is reached by the k-th hit; 0.1 * 3 > 0.3 in floating point would ask for a fourth
    hits = torch.zeros(1, 100, dtype=torch.bool)
    hits[0, torch.arange(10) ** 2] = True  # ranks 1, 2, 5, 10, ...: precision falls from hit to hit
    at_hits = [(k + 1) / (k * k + 1) for k in range(10)]
    expected = (max(at_hits) + sum(max(at_hits[k:]) for k in range(10))) / 11
    assert eleven_point(hits, interpolated(precisions(hits))).item() == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_average_precision_is_that_of_scikit_learn(metric: Any) -> None:
    database, queries = rows(60).double(), rows(7, seed=1).double()
    labels, asked = torch.arange(60) % 4, torch.arange(7) % 4
    unit = [one / one.norm(dim=1, keepdim=True) for one in (database, queries)]
    near = -torch.cdist(queries, database) if metric == "l2" else unit[1] @ unit[0].T
    expected = [average_precision_score((labels == label).numpy(), row.numpy())
                for row, label in zip(near, asked, strict=True)]  # fmt: skip
    found = score_retrieval(database, labels, queries, asked, metric=metric)
    assert found.average_precision == pytest.approx(np.mean(expected), abs=1e-12)


def test_eleven_points_follow_from_the_exact_ones_where_precision_only_falls() -> None:
    """With 10 images of the class and falling precision, levels 0.1 to 1 are the hits, and level 0 is the first."""
    relevant = [1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    hits = torch.tensor([relevant]).bool()
    at_hits = precisions(hits)[hits]
    scores = on_a_line(relevant)
    falling = torch.cummax(at_hits.flip(0), 0).values.flip(0)
    assert 11 * scores.map_11_point - float(falling[0]) == pytest.approx(float(falling.sum()))
    perfect = on_a_line([1] * 10 + [0] * 5)
    assert perfect.map_11_point == perfect.average_precision == 1.0


def test_features_of_any_shape_and_moved_or_scaled_ones() -> None:
    database, queries = rows(50, 12), rows(9, 12, seed=1)
    labels, asked = torch.arange(50) % 3, torch.arange(9) % 3
    flat = score_retrieval(database, labels, queries, asked)
    assert score_retrieval(database.view(50, 3, 2, 2), labels, queries.view(9, 3, 2, 2), asked) == flat
    assert score_retrieval(1e3 + database.double(), labels, 1e3 + queries.double(), asked) == flat
    cosine = score_retrieval(database, labels, queries, asked, metric="cosine")
    lengths = 0.1 + torch.arange(50.0).unsqueeze(1)
    assert score_retrieval(lengths * database, labels, 7 * queries, asked, metric="cosine") == cosine
    assert score_retrieval(lengths * database, labels, 7 * queries, asked) != flat


def test_blocks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = rows(300, 5), torch.arange(300) % 5, rows(290, 5, seed=1), torch.arange(290) % 5
    whole = {compat: score_retrieval(*sets, compat=compat) for compat in retrieval.COMPATS}
    monkeypatch.setattr(retrieval, "BLOCK_VALUES", 1700)  # five queries, 340 rows of the database
    for compat in retrieval.COMPATS:
        counts: list[int] = []
        found = score_retrieval(*sets, compat=compat, done=counts.append)
        assert sum(counts) == 290 and max(counts) == 5
        assert list(found.to_json().values()) == pytest.approx(list(whole[compat].to_json().values()), abs=1e-14)


def test_the_released_program_interpolates_as_many_ranks_as_a_batch_has_queries_less_one() -> None:
    database, labels = rows(400, 4), torch.arange(400) % 5
    queries, asked = rows(150, 4, seed=1), torch.arange(150) % 5  # batches of 128 and 22
    order = torch.cdist(queries.double(), database.double()).argsort(dim=1, stable=True)
    relevance = labels[order] == asked.unsqueeze(1)
    raised = precisions(relevance)
    for first, last in ((0, 128), (128, 150)):
        for row in raised[first:last]:
            for rank in reversed(range(last - first - 1)):
                row[rank] = max(row[rank], row[rank + 1])
    recall = relevance.cumsum(1).double() / relevance.sum(1, keepdim=True)
    at_levels = [[row[int((own - 0.1 * tenth).abs().argmin())] for tenth in range(11)]
                 for row, own in zip(raised, recall, strict=True)]  # fmt: skip
    found = score_retrieval(database, labels, queries, asked, compat="released")
    assert found.map_11_point == pytest.approx(torch.tensor(at_levels).double().mean().item(), abs=1e-12)
    assert found.top_100 == pytest.approx(raised[:, 99].mean().item(), abs=1e-12)
    correct = score_retrieval(database, labels, queries, asked)
    assert correct.map_11_point > found.map_11_point and correct.top_100 > found.top_100
    assert correct.average_precision == pytest.approx(found.average_precision, abs=1e-14)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_degenerate_features_have_scores(metric: Any) -> None:
    labels, asked = torch.arange(20) % 2, torch.arange(4) % 2
    for value in (torch.zeros(20, 3), torch.full((20, 3), 1e4), torch.eye(3).repeat(7, 1)[:20]):
        found = score_retrieval(value, labels, value[:4], asked, metric=metric)
        assert all(0 <= score <= 1 for score in found.to_json().values())
    # all equal: the order is that of the database, 0 1 0 1 ...
    same = score_retrieval(torch.ones(20, 3), labels, torch.ones(1, 3), torch.tensor([0]), metric=metric)
    assert same.average_precision == pytest.approx(sum((k + 1) / (2 * k + 1) for k in range(10)) / 10)


def test_as_many_distances_are_held_as_are_allowed() -> None:
    for compat in retrieval.COMPATS:
        blocks = list(retrieval._blocks(10_000, 60_000, compat))
        assert max(stop - start for start, stop, _ in blocks) * 60_000 <= retrieval.BLOCK_VALUES
        assert [place for start, stop, _ in blocks for place in range(start, stop)] == list(range(10_000))
    assert {stop - start for start, stop, _ in retrieval._blocks(9, 10**9, "released")} == {1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "l1"}, "metric must be one of l2, cosine, got 'l1'"),
        ({"compat": "old"}, "compat must be one of correct, released, got 'old'"),
        ({"database": torch.zeros(5)}, "database needs features"),
        ({"queries": torch.zeros(0, 2), "query_labels": torch.zeros(0)}, "queries needs features"),
        ({"query_labels": torch.zeros(3)}, "queries needs features"),
        ({"queries": torch.zeros(2, 3)}, r"must have one size, got \(2,\) and \(3,\)"),
        ({"database": torch.full((4, 2), torch.nan)}, "features of the database are not all finite"),
        ({"query_labels": torch.tensor([0, 9])}, r"the database has no images of the queries' classes \[9\]"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    good = {
        "database": torch.zeros(4, 2), "database_labels": torch.arange(4) % 2,
        "queries": torch.zeros(2, 2), "query_labels": torch.arange(2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        score_retrieval(**{**good, **changes})
