"""What a training needs of the devices it runs on: this module's engine is one device, where there is nothing to do.

Errors: :class:`PeerLostError` and :class:`FirstFailedError` (both ``RuntimeError``) end a process whose training cannot
continue because of another process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # a command that trains nothing does not wait for torch
    from torch import Tensor, nn

T = TypeVar("T")


class PeerLostError(RuntimeError):
    """Another process of this training has ended, or cannot be reached."""


class FirstFailedError(RuntimeError):
    """The first process has failed at what it does for all; it says itself what was wrong."""


class Engine:
    """One device. An engine of several overrides whatever is a matter of more than one process.

    All processes of a training run the same program. What is said to return "the same on all" is a collective call:
    every process makes it, in the same order.
    """

    size = 1
    """Number of processes, each with its own device."""
    rank = 0
    """Number of this process among them, from 0."""
    local_rank = 0
    """Number of this process among those on its machine, from 0: that of its GPU."""
    synchronizes = True
    """Whether batch norm takes the statistics of the whole batch, rather than those of the process's share."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    # who does what

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do something by itself, however long it takes; return what it gave, the same on all.

        Args:
            work: Runs in the first process alone, as on one device; returns plain data (what JSON holds).

        Raises:
            FirstFailedError: In the other processes, where it raised something in the first.
        """
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let the first process do something before all others do the same; return each process's own result.

        Raises:
            FirstFailedError: In the other processes, where it raised something in the first.
        """
        return work()

    def decide(self, value: bool) -> bool:  # noqa: FBT001 - reads as a sentence
        """Return what the first process has to say, the same on all."""
        return value

    def wait(self) -> None:
        """Wait until every process is here: what the first one has written by then can be read."""

    def texts(self, text: str) -> list[str]:
        """Return a text of each process, by rank, the same on all."""
        return [text]

    # a training

    def share(self, images: int) -> slice:
        """Return which rows of a batch are this process's.

        Args:
            images: In the whole batch.

        Raises:
            ValueError: If they cannot be shared out evenly: a mean of means would weigh images differently.
        """
        return slice(0, images)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the processes, in place: bit for bit the same on all."""

    def sums(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return scalars (shape ``[]``) summed over the processes, the same on all."""
        return values

    def copy_first(self, modules: Sequence[nn.Module]) -> None:
        """Give every process the parameters and buffers that these modules have in the first one, in place."""

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the batch, the same on all.

        A loss of the whole batch that each process computes from them gives the right gradient once gradients are
        averaged.

        Args:
            rows: This process's, shape ``[images, ...]``.
        """
        return rows

    def on_whole_batches(self) -> AbstractContextManager[object]:
        """Return the context of what every process computes on whole batches: batch norm has nothing to gather."""
        return nullcontext()

    def training(self, modules: Sequence[nn.Module]) -> AbstractContextManager[object]:  # noqa: ARG002
        """Return the context in which these modules train: batch norm takes the statistics of whole batches."""
        return nullcontext()


_ONE = Engine()
_current: list[Engine] = [_ONE]


def current() -> Engine:
    """Return the engine of this process: one device, unless it has joined others."""
    return _current[-1]


@contextmanager
def using(engine: Engine) -> Iterator[Engine]:
    """Let an engine be the current one within a block."""
    _current.append(engine)
    try:
        yield engine
    finally:
        _current.pop()


def alone() -> AbstractContextManager[Engine]:
    """Return a block in which this process works as on one device: it waits for no other."""
    return using(_ONE)


def shared_rows(images: int, rank: int, size: int) -> slice:
    """Return which rows of a batch a process takes: neighbors, so that an image still comes before the same one.

    Args:
        images: In the whole batch.
        rank: Of the process, from 0.
        size: Number of processes.

    Raises:
        ValueError: If they cannot be shared out evenly.

    Example:
        >>> shared_rows(6, 1, 2)
        slice(3, 6, None)
    """
    if images % size:
        below, above = images // size * size, (images // size + 1) * size
        choices = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"a batch of {images} images cannot be shared evenly by {size} devices, and an uneven share would weigh "
            f"images differently; set data.batch_size to a multiple of {size} (e.g. {choices})"
        )
    share = images // size
    return slice(rank * share, (rank + 1) * share)


def agree(values: Mapping[str, Any], engine: Engine, what: str) -> None:
    """Raise unless all processes see the same.

    Args:
        values: What each sees: names and texts.
        engine: Of the processes.
        what: Names the values in the error.

    Raises:
        ValueError: Naming the first process that sees something else.
    """
    texts = engine.texts(repr(sorted(values.items())))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"{what}: process 0 sees {texts[0]}, process {rank} {text}; all processes of a training need the same "
                f"run folder (a file system that all machines share), the same config and the same images"
            )
