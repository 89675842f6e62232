"""Several processes, one device each, that train one net: every batch is divided, every gradient averaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, distributed, nn

from qkd.engines.batch_norm import synchronized
from qkd.engines.engine import Engine, FirstFailedError, PeerLostError, alone, current, shared_rows
from qkd.engines.membership import TRAINING_TIMEOUT
from qkd.engines.wires import Wires, connect

T = TypeVar("T")
FOR_ANY_WORK = timedelta(days=30)  # a long export is no reason to give up; dead processes are detected differently
_DONE, _FAILED = "done ", "failed"


class DeviceGroup(Engine):
    """The processes of ``torch.distributed``'s default group, which is initialized.

    Args:
        store: The group's store, used for short messages and for waiting on long work.
        control: A CPU group (gloo) for decisions, so that they do not wait for a GPU; None for the default group.
        local_rank: Rank of this process on its machine, from 0.
        synchronizes: Whether batch norm uses the statistics of whole batches.
    """

    def __init__(
        self,
        store: Any,
        control: distributed.ProcessGroup | None = None,
        *,
        local_rank: int = 0,
        synchronizes: bool = True,
    ) -> None:
        self.size, self.rank = distributed.get_world_size(), distributed.get_rank()
        self.local_rank, self.synchronizes = local_rank, synchronizes
        self._store, self._control = store, control
        self._messages = 0
        self._is_whole = False
        self._wires: Wires | None = None
        self._has_asked = False

    # who does what

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do something alone; the others wait and get its plain data."""
        key = self._key()
        if self.is_first:
            try:
                with alone():
                    value = work()
                said = _DONE + json.dumps(value)
            except BaseException:
                self._tell(key, _FAILED)
                raise
            self._tell(key, said)
            return value
        return cast(T, json.loads(self._hear(key)))

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let the first process do something before all others do the same."""
        key = self._key()
        if not self.is_first:
            self._hear(key)
            return work()
        try:
            value = work()
        except BaseException:
            self._tell(key, _FAILED)
            raise
        self._tell(key, _DONE + "null")
        return value

    def decide(self, value: bool) -> bool:  # noqa: FBT001 - reads as a sentence
        """Return the value of the first process."""
        said = torch.tensor([int(value)])
        with _reached():
            distributed.broadcast(said, 0, group=self._control)
        return bool(said)

    def wait(self) -> None:
        """Wait for every process."""
        self.decide(True)  # the message of the first process has arrived
        said = torch.zeros(1)
        with _reached():
            distributed.all_reduce(said, group=self._control)

    def texts(self, text: str) -> list[str]:
        """Return the text of each process, by rank."""
        key = self._key()
        self._tell(f"{key}/{self.rank}", _DONE + text)
        return [self._hear(f"{key}/{rank}") for rank in range(self.size)]

    def leave(self) -> None:
        """Close the connections to the other processes."""
        if self._wires is not None:
            self._wires.close()

    def report(self) -> bool:
        """Return whether this process is the first to report a failure, so that only one does."""
        return bool(self._store.add("reports", 1) == 1)

    def _key(self) -> str:
        self._messages += 1
        return f"message/{self._messages}"

    def _tell(self, key: str, said: str) -> None:
        with _reached():
            self._store.set(key, said)

    def _hear(self, key: str) -> str:
        with _reached():
            self._store.wait([key], FOR_ANY_WORK)
            said: str = self._store.get(key).decode("utf-8")
        if said == _FAILED:
            raise FirstFailedError("the first process has failed; its own message says why")
        return said.removeprefix(_DONE)

    # a training

    def share(self, images: int, most: int | None = None) -> slice:
        """Return the rows of a batch that belong to this process."""
        return shared_rows(images, self.rank, self.size, most)

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor with its mean over the processes, in place."""
        for group in _alike(tensors):
            wire = _wire_of(group)
            self._reduce(wire)
            _put_back(group, wire.div_(self.size))

    def sums(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return scalars summed over the processes, in float64."""
        if not values:
            return values
        device = next((value.device for value in values.values() if value.device.type != "cpu"), torch.device("cpu"))
        total = torch.stack([value.detach().double().to(device) for value in values.values()])
        self._reduce(total)
        return dict(zip(values, total.unbind(), strict=True))

    @torch.no_grad()
    def copy_first(self, modules: Sequence[nn.Module]) -> None:
        """Copy the parameters and buffers of the first process to all, in place."""
        tensors = [tensor for module in modules for tensor in module.state_dict().values()]
        for group in _alike(tensors):
            wire = _wire_of(group)
            with _reached():
                distributed.broadcast(wire, 0, group=self._way(wire))
            _put_back(group, wire)

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the batch."""
        return cast(Tensor, _Whole.apply(rows, self))

    @contextmanager
    def on_whole_batches(self) -> Iterator[None]:
        """Let batch norm treat its input as a whole batch within a block."""
        before, self._is_whole = self._is_whole, True
        try:
            yield
        finally:
            self._is_whole = before

    def training(self, modules: Sequence[nn.Module]) -> AbstractContextManager[object]:
        """Return the context in which batch norm uses the statistics of whole batches, unless that is off."""
        if not self.synchronizes:
            return super().training(modules)
        return synchronized(modules, self._reduce, lambda: current() is self and not self._is_whole)

    def _reduce(self, tensor: Tensor) -> None:
        is_small = Wires.takes(tensor)
        if is_small and not self._has_asked:  # in all processes at once, by their first small sum
            self._has_asked, self._wires = True, connect(self.rank, self.size, TRAINING_TIMEOUT, self.texts)
        with _reached():
            if is_small and self._wires is not None:
                self._wires.reduce(tensor)
            else:
                distributed.all_reduce(tensor, group=self._way(tensor))

    def _way(self, tensor: Tensor) -> distributed.ProcessGroup | None:
        """Return the group that sends a tensor: GPU groups cannot send CPU tensors."""
        return self._control if tensor.device.type == "cpu" else None


class _Whole(torch.autograd.Function):
    """Gather rows. Every process computes a loss from all rows, and takes its gradient from its own rows only.

    The gradient is multiplied by the number of processes, because gradients are then averaged rather than summed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: DeviceGroup) -> Tensor:
        ctx.group, ctx.rows = group, slice(group.rank * len(rows), (group.rank + 1) * len(rows))
        wire = _on_the_wire(rows)
        gathered = wire.new_zeros((group.size * len(rows), *rows.shape[1:]))
        gathered[ctx.rows] = wire
        group._reduce(gathered)  # each row is zero in all processes but one, so nothing is rounded
        return gathered.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.rows] * ctx.group.size, None


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors by type and device, so that each group is sent at once."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())


def _on_the_wire(tensor: Tensor) -> Tensor:
    """Convert a tensor, without loss, to a type that every backend can send."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor


def _wire_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of tensors of one type and device as one flat tensor to send."""
    return torch.cat([_on_the_wire(tensor).reshape(-1) for tensor in tensors])


def _put_back(tensors: Sequence[Tensor], wire: Tensor) -> None:
    start = 0
    for tensor in tensors:
        tensor.copy_(wire[start : start + tensor.numel()].reshape(tensor.shape))
        start += tensor.numel()


@contextmanager
def _reached() -> Iterator[None]:
    """Replace the transport's errors about a lost process with a readable one."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise PeerLostError(
            "another process of this training has ended or cannot be reached, so this one stops as well; the same "
            "command resumes from the last checkpoint"
        ) from error
