"""Sums over sockets: exact, the same in all processes, and an error when one is gone. Threads stand for processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import qkd.engines.wires as module
from qkd.engines.engine import PeerLostError
from qkd.engines.group import _reached
from qkd.engines.wires import LARGEST, Wires, connect


class Meeting:
    """What the group's store does: everyone hears what everyone says."""

    def __init__(self, size: int) -> None:
        self.size, self.said = size, [""] * size
        self.barrier = threading.Barrier(size)

    def texts(self, rank: int) -> Callable[[str], list[str]]:
        def tell(text: str) -> list[str]:
            self.said[rank] = text
            self.barrier.wait(20)
            heard = list(self.said)
            self.barrier.wait(20)
            return heard

        return tell


@contextmanager
def wired(size: int, timeout: timedelta = timedelta(seconds=20)) -> Iterator[list[Wires]]:
    found = connected(size, timeout)
    yield [one for one in found if one is not None]
    for one in filter(None, found):
        one.close()


def connected(size: int, timeout: timedelta = timedelta(seconds=20)) -> list[Wires | None]:
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: connect(rank, size, timeout, meeting.texts(rank)), range(size)))


def summed(wires: list[Wires], tensors: list[Tensor]) -> list[Tensor]:
    def one(pair: tuple[Wires, Tensor]) -> Tensor:
        pair[0].reduce(pair[1])
        return pair[1]

    with ThreadPoolExecutor(len(wires)) as pool:
        return list(pool.map(one, zip(wires, tensors, strict=True)))


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")


def test_sums_are_added_in_the_order_of_the_ranks() -> None:
    with wired(3) as wires:
        for dtype in (torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8):
            parts = [torch.randn(7, 3, generator=torch.Generator().manual_seed(rank)).mul(9) for rank in range(3)]
            parts = [part.to(dtype) for part in parts]
            wanted = parts[0] + parts[1] + parts[2]
            found = summed(wires, [part.clone() for part in parts])
            assert len(found) == 3 and all(torch.equal(one, wanted) for one in found)
        large = [torch.tensor(value, dtype=torch.float32) for value in (1e8, -1e8, 1.0)]
        assert [float(one) for one in summed(wires, large)] == [1.0] * 3, "rank by rank, or the 1 would be lost"


def test_largest_tensors_do_not_block() -> None:
    """All send before they receive, and a fast process is one sum ahead of a slow one."""
    with wired(3) as wires:
        for _ in range(50):
            found = summed(wires, [torch.full((LARGEST // 8,), float(rank), dtype=torch.float64) for rank in range(3)])
            assert len(found) == 3 and all(torch.equal(one, torch.full_like(one, 3)) for one in found)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(LARGEST // 8 + 1, dtype=torch.float64),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(4, 4).t()[1:],
        torch.zeros(0),
        torch.zeros(2, device="meta"),
    ],
    ids=["large", "bfloat16", "strided", "empty", "device"],
)
def test_what_gloo_has_to_sum(tensor: Tensor) -> None:
    assert not Wires.takes(tensor)


def test_a_lost_process_is_an_error() -> None:
    with wired(3) as wires:
        wires[1].close()
        for one in (wires[0], wires[2]):
            with pytest.raises(OSError, match="closed|[Bb]roken pipe|reset"):
                one.reduce(torch.zeros(4))


@pytest.mark.parametrize("error", [RuntimeError("of gloo"), ConnectionResetError("of a socket"), TimeoutError()])
def test_every_way_of_being_lost_has_one_message(error: Exception) -> None:
    with pytest.raises(PeerLostError, match="the same command resumes from the last checkpoint"), _reached():
        raise error


def test_a_silent_process_is_an_error() -> None:
    with (
        wired(3, timedelta(seconds=0.2)) as wires,
        pytest.raises(OSError, match="timed out"),
    ):
        wires[0].reduce(torch.zeros(4))


def test_one_process_that_is_told_less_is_no_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher by hand may set LOCAL_WORLD_SIZE in some processes only."""
    told = iter(["3", None, "3"])
    environment = SimpleNamespace(get=lambda _: next(told))
    monkeypatch.setattr(module, "os", SimpleNamespace(environ=environment))
    assert connected(3) == [None] * 3


def test_several_machines_use_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert connected(3) == [None] * 3
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert connected(3) == [None] * 3


@pytest.mark.parametrize("fault", ["address", "folder", "buffer"])
def test_all_use_gloo_if_one_cannot_connect(monkeypatch: pytest.MonkeyPatch, fault: str, tmp_path: Path) -> None:
    asked = iter(range(9))
    if fault == "address":
        listening = module._listening
        monkeypatch.setattr(module, "_listening", lambda *a: None if next(asked) == 1 else listening(*a))
    elif fault == "folder":
        make = module.tempfile.mkdtemp
        missing = str(tmp_path / "missing")
        monkeypatch.setattr(
            module.tempfile, "mkdtemp", lambda **k: make(dir=missing if next(asked) == 1 else None, **k)
        )
    else:
        monkeypatch.setattr(module, "BUFFER", 1024)
    monkeypatch.setattr(module, "CONNECTING_S", 1.0)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    assert connected(3) == [None] * 3
    assert not list(tmp_path.iterdir()), "no socket is left behind"
