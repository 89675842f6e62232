"""The rows of a student's peers in a report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qkd.methods.report_row import Row, row_of
from qkd.report.records import Record, Result


class PeersRecord(Record):
    """The peers' part of their student's result."""

    peers: list[Result] = []


def peer_rows(path: Path, results: Mapping[str, Mapping[str, Any]]) -> list[Row]:  # noqa: ARG001
    """Return one row per peer.

    Args:
        path: The run folder.
        results: Role -> content of its ``result.json``.
    """
    return [row_of("peer", peer) for peer in results["student"].get("peers", [])]
