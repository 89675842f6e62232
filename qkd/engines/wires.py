"""Sums of small tensors between the processes of one machine, over separate sockets.

Synchronized batch norm adds a few hundred numbers per layer, twice per step. Gloo passes each sum from thread to
thread, and that takes many times as long as to send it.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LARGEST = 1 << 16  # bytes of a tensor: two of them fit into a socket's buffer, so sending never waits for the receiver
BUFFER = 1 << 18  # bytes
CONNECTING_S = 60.0
_OK, _NO = "ok", "no"
_NUMPY_TYPES = frozenset({torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8})


class Wires:
    """Connections to all other processes, each on this machine.

    Args:
        rank: Rank of this process.
        others: Rank of each other process -> connection to it.
        timeout: How long to wait for another process.
    """

    def __init__(self, rank: int, others: Mapping[int, socket.socket], timeout: timedelta) -> None:
        self._rank, self._others = rank, dict(sorted(others.items()))
        for peer in self._others.values():
            peer.settimeout(timeout.total_seconds())

    @staticmethod
    def takes(tensor: Tensor) -> bool:
        """Return whether a tensor can be summed here; the same in all processes if its shape and type are."""
        is_small = 0 < tensor.numel() * tensor.element_size() <= LARGEST
        return is_small and tensor.device.type == "cpu" and tensor.dtype in _NUMPY_TYPES and tensor.is_contiguous()

    def reduce(self, tensor: Tensor) -> None:
        """Replace a tensor with its sum over all processes, added in the order of their ranks.

        Args:
            tensor: One that :meth:`takes` accepts, of the same shape and type in all processes.

        Raises:
            OSError: If another process has ended, or does not answer in time.
        """
        values = tensor.detach().numpy()
        own = values.copy()
        for peer in self._others.values():
            peer.sendall(own)
        parts = {rank: _received(peer, own) for rank, peer in self._others.items()}
        parts[self._rank] = own
        values[...] = 0
        for _, part in sorted(parts.items()):
            values += part

    def close(self) -> None:
        """Close all connections."""
        for peer in self._others.values():
            peer.close()


def connect(rank: int, size: int, timeout: timedelta, texts: Callable[[str], list[str]]) -> Wires | None:
    """Connect every process with every other; all of them call this at the same time.

    Args:
        rank: Rank of this process.
        size: Number of processes.
        timeout: How long a sum may wait for another process.
        texts: Collective call that returns the text of each process, by rank.

    Returns:
        The connections; None, in all processes, if they run on several machines or one of them cannot connect.
    """
    others: dict[int, socket.socket] = {}
    with ExitStack() as stack:
        listener = _listening(size, stack)
        addresses = texts("" if listener is None else str(listener.getsockname()))
        has_met = listener is not None and "" not in addresses and _meet(rank, listener, addresses, others)
        answers = texts(_OK if has_met else _NO)
    wires = Wires(rank, others, timeout)
    if _NO in answers:
        wires.close()
        return None
    return wires


def _listening(size: int, stack: ExitStack) -> socket.socket | None:
    """Return what others can connect to, until the stack closes; None if the system, or another machine, forbids it."""
    if os.environ.get("LOCAL_WORLD_SIZE") != str(size) or not hasattr(socket, "AF_UNIX"):
        return None
    try:
        folder = tempfile.mkdtemp(prefix="qkd-")  # only this user can enter it
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(Path(folder) / "wire"))
        listener.listen(size)
    except OSError:  # for example, a full disk or a path that is too long
        return None
    listener.settimeout(CONNECTING_S)
    return listener


def _meet(rank: int, listener: socket.socket, addresses: list[str], others: dict[int, socket.socket]) -> bool:
    """Connect to the processes of lower rank, accept those of higher rank, and return whether all of that worked."""
    try:
        for other, address in enumerate(addresses[:rank]):
            others[other] = socket.socket(socket.AF_UNIX)
            _prepare(others[other])
            others[other].connect(address)
            others[other].sendall(rank.to_bytes(4, "little"))
        for _ in addresses[rank + 1 :]:
            peer, _ = listener.accept()
            with ExitStack() as on_error:
                on_error.callback(peer.close)
                _prepare(peer)
                said = bytearray(4)
                _fill(peer, memoryview(said))
                others[int.from_bytes(said, "little")] = peer
                on_error.pop_all()
    except (OSError, ValueError):
        return False
    return True


def _prepare(peer: socket.socket) -> None:
    """Give a connection room for two messages.

    Raises:
        ValueError: If the system allows less.
    """
    peer.settimeout(CONNECTING_S)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        peer.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        if peer.getsockopt(socket.SOL_SOCKET, option) < 3 * LARGEST:  # Linux counts its own overhead, too
            raise ValueError("buffers of sockets are too small")


def _received(peer: socket.socket, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the values that another process has sent."""
    found = np.empty_like(like)
    _fill(peer, found.reshape(-1).data.cast("B"))
    return found


def _fill(peer: socket.socket, place: memoryview) -> None:
    while place:
        count = peer.recv_into(place)
        if not count:
            raise ConnectionResetError("the other process has closed the connection")
        place = place[count:]
