"""Files of the export: whole or not at all, and never in the place of a device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from export import ExportError
from export.writing import write_whole


def test_a_file_is_replaced_and_nothing_else_is_there(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        write_whole(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    """As with every file of a run; a model was written over it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ExportError, match="is a device, a pipe or a socket"):
        write_whole(tmp_path / "pipe", b"model")
    assert (tmp_path / "pipe").is_fifo()
