"""Whole-or-nothing writes, verified reads, and what is refused."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from qkd import files
from qkd.files import whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_bytes_come_back_and_their_hash_is_returned(tmp_path: Path) -> None:
    sha256 = files.write_bytes(tmp_path / "a", b"content")
    assert files.read_verified(tmp_path / "a", sha256) == b"content"
    assert files.sha256_of(tmp_path / "a") == sha256
    assert sha256 == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"  # sha256sum
    assert names(tmp_path) == ["a"]


def test_tensors_of_any_layout_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(2, 3, 4, 4)
    tensors = {
        "plain": base,
        "channels last": base.to(memory_format=torch.channels_last),
        "view": base[:, 1:],
        "shared": base,
        "whole numbers": torch.arange(5),
        "flag": torch.tensor(True),
    }
    files.write_safetensors(tmp_path / "t", tensors, {"net": "x"})
    found = files.read_safetensors(tmp_path / "t")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert files.read_metadata(tmp_path / "t") == {"net": "x"}


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {name: torch.full((3,), float(ord(name))) for name in "bca"}
    facts = dict.fromkeys("zyxwvu", "x")
    hashes = {files.write_safetensors(tmp_path / "t", tensors, facts) for _ in range(20)}
    hashes.add(files.write_safetensors(tmp_path / "t", dict(reversed(tensors.items())), dict(reversed(facts.items()))))
    assert len(hashes) == 1 and files.read_metadata(tmp_path / "t") == facts


def test_json_does_not_take_nan(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"a": [1, 2.5, None, "é"]})
    assert files.read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "é"]}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", float("nan"))
    assert files.read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_full_disk_keeps_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    files.write_bytes(tmp_path / "a", b"before")

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_bytes(tmp_path / "a", b"after")
    monkeypatch.undo()
    assert str(tmp_path / "a") in str(caught.value)
    assert "free some space" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == b"before"
    assert names(tmp_path) == ["a"]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    files.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_killed_write_leaves_only_what_is_cleaned_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_bytes(tmp_path / "a", b"before")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    monkeypatch.setattr(os, "unlink", die)  # a killed process tidies nothing
    with pytest.raises(KeyboardInterrupt):
        files.write_bytes(tmp_path / "a", b"after")
    monkeypatch.undo()
    assert (tmp_path / "a").read_bytes() == b"before"
    assert len(names(tmp_path)) == 2
    files.remove_unfinished([tmp_path])
    assert names(tmp_path) == ["a"]


def test_unwritable_places_are_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="a file is where a folder is needed"):
        files.write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(FileExistsError, match="a file is where a folder is needed"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="is missing: create it"):
        files.write_bytes(tmp_path / "no folder" / "a", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="a folder is where a file is needed"):
        files.write_bytes(tmp_path / "folder", b"")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:5], lambda data: b"", lambda data: b"x" * 99]
)
def test_damage_is_noticed(tmp_path: Path, damage) -> None:
    sha256 = files.write_safetensors(tmp_path / "t", {"a": torch.ones(3)})
    (tmp_path / "t").write_bytes(damage((tmp_path / "t").read_bytes()))
    with pytest.raises(files.DamagedFileError, match="truncated or altered"):
        files.read_verified(tmp_path / "t", sha256)
    with pytest.raises(files.DamagedFileError, match="not a whole safetensors file"):
        files.read_safetensors(tmp_path / "t")
    with pytest.raises(files.DamagedFileError, match="not a whole safetensors file"):
        files.read_metadata(tmp_path / "t")
    with pytest.raises(files.DamagedFileError, match="not JSON"):
        files.read_json(tmp_path / "t")


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    sha256 = files.write_safetensors(tmp_path / "t", {"a": torch.ones(3)})
    data = bytearray((tmp_path / "t").read_bytes())
    data[-1] ^= 1
    (tmp_path / "t").write_bytes(data)
    files.read_safetensors(tmp_path / "t")  # still well-formed: only the hash tells
    with pytest.raises(files.DamagedFileError):
        files.read_verified(tmp_path / "t", sha256)


class Bomb:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_pickles_are_refused_unopened(tmp_path: Path) -> None:
    trace = tmp_path / "opened"
    torch.save({"a": torch.ones(2), "bomb": Bomb(trace)}, tmp_path / "zip")
    for protocol in (2, 4, 5):
        (tmp_path / f"pickle {protocol}").write_bytes(pickle.dumps(Bomb(trace), protocol=protocol))
    for path in (tmp_path / "zip", *tmp_path.glob("pickle *")):
        with pytest.raises(ValueError, match="pickled file") as caught:
            files.read_safetensors(path)
        assert not isinstance(caught.value, files.DamagedFileError)
        with pytest.raises(ValueError, match="pickled file"):
            files.read_verified(path, "0" * 64)
    assert not trace.exists()


def test_a_pipe_or_a_link_to_a_device_is_not_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        with pytest.raises(ValueError, match=f"{path.name}: is a device, a pipe or a socket"):
            files.write_bytes(path, b"x")
    assert pipe.is_fifo() and link.is_symlink() and sorted(tmp_path.iterdir()) == [link, pipe]


@pytest.mark.parametrize("name", ["/dev/null", "/dev/stdout", "/proc/self/fd/1"])
def test_names_of_the_system_are_not_replaced(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def never(*_: object) -> int:
        raise AssertionError("opened")  # a test that fails must not harm the machine

    monkeypatch.setattr(whole.os, "open", never)
    with pytest.raises(ValueError, match="a file would replace"):
        files.write_bytes(Path(name), b"x")


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    """Its first two bytes are those of protocol 2 to 5."""
    tensor = torch.arange(3.0)
    data = next(
        data for pad in range(2000)
        if int.from_bytes((data := safetensors.torch.save({"a" * (pad + 1): tensor}))[:8], "little") == length
    )  # fmt: skip
    (read,) = whole.parse_safetensors(tmp_path / "w.safetensors", data).values()
    assert data[0] == 0x80 and torch.equal(read, tensor)
