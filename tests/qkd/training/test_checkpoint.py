"""Checkpoints: verified, the last two kept, damage survived, pickles refused, full disks survived."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from qkd.training.checkpoint import Checkpoint, CheckpointStore


def checkpoint(value: float) -> Checkpoint:
    return Checkpoint({"a": torch.full((4,), value)}, {"epoch": 1, "rows": [{"loss": value}]})


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoint", warnings.append)


def value(store: CheckpointStore) -> float | None:
    loaded = store.load()
    if loaded is None:
        return None
    assert loaded.state["rows"] == [{"loss": float(loaded.tensors["a"][0])}]
    return float(loaded.tensors["a"][0])


def file(store: CheckpointStore, step: int, suffix: str = "safetensors") -> Path:
    return store.folder / f"step-{step:09}.{suffix}"


def test_nothing_there(store: CheckpointStore) -> None:
    assert store.load() is None and store.steps() == []


def test_the_last_two_are_kept_and_the_last_is_loaded(store: CheckpointStore, warnings: list[str]) -> None:
    for step in (1, 5, 30):
        store.save(step, checkpoint(step))
    assert store.steps() == [5, 30] and value(store) == 30 and warnings == []
    assert len(list(store.folder.iterdir())) == 4


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete"])
def test_a_damaged_one_is_passed_over_with_a_warning(
    store: CheckpointStore, warnings: list[str], suffix: str, damage: str
) -> None:
    store.save(1, checkpoint(1))
    store.save(2, checkpoint(2))
    path = file(store, 2, suffix)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        position = data.index(b"epoch") if suffix == "json" else len(data) - 1
        data[position] ^= 1
    path.write_bytes({"truncate": data[:-3], "flip": data, "empty": b"", "delete": b""}[damage])
    if damage == "delete":
        path.unlink()
    assert value(store) == 1
    told = 0 if (damage, suffix) == ("delete", "json") else 1  # without its JSON it was never finished
    assert len(warnings) == told and all(str(path) in line for line in warnings)


def test_an_altered_number_in_the_json_is_noticed(store: CheckpointStore, warnings: list[str]) -> None:
    store.save(1, checkpoint(1))
    store.save(2, checkpoint(2))
    path = file(store, 2, "json")
    body = json.loads(path.read_text())
    body["state"]["epoch"] = 7
    path.write_text(json.dumps(body))
    assert value(store) == 1 and "truncated or altered" in warnings[0]


def test_all_damaged_is_a_fresh_start(store: CheckpointStore, warnings: list[str]) -> None:
    for step in (1, 2):
        store.save(step, checkpoint(step))
        file(store, step).write_bytes(b"")
    assert store.load() is None and len(warnings) == 2


def test_a_damaged_one_does_not_push_a_good_one_out(store: CheckpointStore) -> None:
    store.save(1, checkpoint(1))
    store.save(5, checkpoint(5))
    file(store, 5).write_bytes(b"")
    assert value(store) == 1
    store.save(3, checkpoint(3))
    assert store.steps() == [1, 3] and value(store) == 3


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_pickled_checkpoint_is_refused(store: CheckpointStore, suffix: str) -> None:
    store.save(1, checkpoint(1))
    store.save(2, checkpoint(2))
    torch.save({"a": torch.ones(4)}, file(store, 2, suffix))
    with pytest.raises(ValueError, match="pickled file.*refused.*delete a checkpoint"):
        store.load()
    for path in store.folder.glob("step-000000002.*"):
        path.unlink()
    assert value(store) == 1


def test_another_format_is_refused(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qkd.training.checkpoint.FORMAT", 99)
    store.save(1, checkpoint(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="checkpoint format 99"):
        store.load()


def test_a_full_disk_keeps_the_earlier_ones(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(1, checkpoint(1))
    store.save(2, checkpoint(2))
    write, budget = os.write, [file(store, 2).stat().st_size + 50]

    def full(handle: int, data: bytes) -> int:
        budget[0] -= len(data)
        if budget[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    for _ in range(3):  # first the tensors fit and the JSON does not, then nothing does
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device; free some space"):
            store.save(3, checkpoint(3))
        monkeypatch.undo()
        assert value(store) == 2 and store.steps() == [1, 2]
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]
    store.save(3, checkpoint(3))
    assert value(store) == 3 and store.steps() == [2, 3]


def test_strangers_are_left_alone(store: CheckpointStore) -> None:
    store.save(1, checkpoint(1))
    (store.folder / "notes.txt").write_text("mine")
    store.prune(1)
    assert (store.folder / "notes.txt").exists() and value(store) == 1


def test_all_are_cleared_and_nothing_else(store: CheckpointStore) -> None:
    store.clear()
    store.save(1, Checkpoint({"a": torch.zeros(1)}, {}))
    (store.folder / "notes.txt").write_text("mine")
    store.clear()
    assert [path.name for path in store.folder.iterdir()] == ["notes.txt"]
    (store.folder / "notes.txt").unlink()
    store.clear()
    assert not store.folder.exists()
