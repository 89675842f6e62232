"""Join and leave the processes that were started together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from qkd.engines.engine import Engine, FirstFailedError, PeerLostError, using
from qkd.engines.membership import LOST, MEETING, TRAINING_TIMEOUT, is_first, is_member, is_started_by_us
from qkd.failures import ConfigError, UsageError
from qkd.files import only_reading

if TYPE_CHECKING:
    from qkd.engines.group import DeviceGroup

GRACE_S = 2.0  # so that the process where the error occurred reports first
_joined: list[DeviceGroup] = []


@contextmanager
def joined(device: str, *, synchronizes: bool = True) -> Iterator[Engine]:
    """Join this process with those that were started with it, for a block; a single process is one device.

    Args:
        device: As in the config: ``auto``, ``cpu``, ``cuda`` or ``cuda:0``.
        synchronizes: Whether batch norm uses statistics of the whole batch, across processes.

    Raises:
        ValueError: If a machine has fewer GPUs than processes, and each needs its own.
        PeerLostError: If the others do not connect.
    """
    if not is_member():
        yield Engine()
        return
    group = _join(device, synchronizes=synchronizes)
    _joined.append(group)
    with using(group), nullcontext() if group.is_first else only_reading():
        yield group
    group.wait()  # the first process hosts the store of the others
    group.leave()
    _joined.clear()
    _leave()


def speaks_up(error: BaseException) -> bool:
    """Return whether this process should report why all of them failed.

    Args:
        error: The error that ends it.
    """
    if isinstance(error, FirstFailedError):
        return False
    if not _joined:  # bad input is the same in all processes
        return is_first() or not isinstance(error, ConfigError | UsageError)
    if isinstance(error, PeerLostError):
        if is_started_by_us():
            return False  # the parent process has seen how the other one ended
        time.sleep(GRACE_S)
    try:
        return _joined[0].report()
    except RuntimeError:  # the store went down with the process that held it
        return True


def exit_code(error: BaseException, code: int) -> int:
    """Return the exit code of a process that fails: a separate one if the cause is another process."""
    return LOST if isinstance(error, PeerLostError | FirstFailedError) and is_started_by_us() else code


def _join(device: str, *, synchronizes: bool) -> DeviceGroup:
    import torch
    from torch import distributed

    from qkd.engines.group import DeviceGroup

    local, backend = int(os.environ.get("LOCAL_RANK", "0")), _backend(device)
    if backend == "nccl":
        torch.cuda.set_device(local)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store = _store(rank, size)
        distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TRAINING_TIMEOUT)
        control: Any = None if backend == "gloo" else distributed.new_group(backend="gloo", timeout=TRAINING_TIMEOUT)
    except RuntimeError as error:
        raise PeerLostError(
            f"process {rank} of {size} could not connect to the others ({str(error).splitlines()[0]}); check that "
            f"MASTER_ADDR and MASTER_PORT can be reached from every machine"
        ) from error
    return DeviceGroup(store, control, local_rank=local, synchronizes=synchronizes)


def _store(rank: int, size: int) -> Any:
    from torch.distributed import FileStore, PrefixStore, rendezvous  # type: ignore[attr-defined]

    if is_started_by_us():
        return FileStore(os.environ[MEETING], size)
    found, _, _ = next(rendezvous("env://", rank, size, timeout=TRAINING_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store keeps messages of earlier attempts
    return PrefixStore(f"qkd/{attempt}", found)


def _backend(device: str) -> str:
    """Return the backend: nccl if every process has its own GPU, otherwise gloo."""
    import torch

    if device == "cpu" or ":" in device or not torch.cuda.is_available():
        return "gloo"  # a GPU given by number is shared by all processes
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])), torch.cuda.device_count()
    if here > there:
        raise ValueError(
            f"device: {here} processes on this machine need one GPU each, but it has {there}; start {there}, share one "
            f"with device=cuda:0, or use device=cpu"
        )
    return "nccl"


def _leave() -> None:
    from torch import distributed

    distributed.destroy_process_group()
