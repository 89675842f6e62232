"""Files that are named: regular ones, within bounds, and never a wait."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from qkd.foreign import UnreadableFileError, is_regular, open_regular, read_regular, read_text


def test_a_file_and_a_link_to_it_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b") == b"content" and read_text(tmp_path / "a") == "content"
    assert is_regular(tmp_path / "b") and not is_regular(tmp_path) and not is_regular(tmp_path / "none")


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket is at most 107 bytes long
        server.bind("socket")
        for name, word in (("fifo", "named pipe"), ("link", "named pipe"), ("socket", "socket")):
            with pytest.raises(UnreadableFileError, match=f"is a {word}, not a file"):
                open_regular(tmp_path / name)
    with pytest.raises(UnreadableFileError, match="is a device"):
        read_regular("/dev/zero")
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none")
    with pytest.raises(UnreadableFileError, match="not a name"):
        read_regular("a\0b")


def test_a_large_one_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UnreadableFileError, match=r"1,099,511,627,776 bytes.*at most 67,108,864"):
        read_regular(tmp_path / "sparse")
