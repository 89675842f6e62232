"""The interface between a training and its devices; the engine of this module is one device and has nothing to do.

Errors: :class:`PeerLostError` and :class:`FirstFailedError` (both ``RuntimeError``) end a process whose training cannot
continue because of another process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # commands that do not train should not have to import torch
    from torch import Tensor, nn

T = TypeVar("T")


class PeerLostError(RuntimeError):
    """Another process of this training has ended, or cannot be reached."""


class FirstFailedError(RuntimeError):
    """The first process has failed at something it does for all; it reports the cause itself."""


class Engine:
    """One device. An engine of several devices overrides everything that involves more than one process.

    All processes of a training run the same program. Methods that return "the same on all" are collective calls: every
    process makes them, in the same order.
    """

    size = 1
    """Number of processes, each with its own device."""
    rank = 0
    """Index of this process among them, from 0."""
    local_rank = 0
    """Index of this process among those on its machine, from 0; also the index of its GPU."""
    step_seed = 0
    """Seed of the current training step, the same on all: of what each process computes for the whole batch."""
    synchronizes = True
    """Whether batch norm uses the statistics of the whole batch, rather than those of the process's share."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    # who does what

    def first(self, work: Callable[[], T]) -> T:
        """Let the first process do something alone, however long it takes; return its result, the same on all.

        Args:
            work: Runs only in the first process, as on one device; returns plain data (JSON values).

        Raises:
            FirstFailedError: In the other processes, if it raised an error in the first.
        """
        return work()

    def in_turn(self, work: Callable[[], T]) -> T:
        """Let the first process do something before all others do the same; return each process's own result.

        Raises:
            FirstFailedError: In the other processes, if it raised an error in the first.
        """
        return work()

    def decide(self, value: bool) -> bool:  # noqa: FBT001 - reads as a sentence
        """Return the value of the first process, the same on all."""
        return value

    def wait(self) -> None:
        """Wait for every process; files that the first one wrote before can then be read."""

    def texts(self, text: str) -> list[str]:
        """Return the text of each process, by rank, the same on all."""
        return [text]

    # a training

    def share(self, images: int, most: int | None = None) -> slice:
        """Return the rows of a batch that belong to this process.

        Args:
            images: Number of images in the whole batch.
            most: Number of images that there are, for the message; None if it is not known.

        Raises:
            ValueError: If they cannot be divided evenly, since a mean of means would weight images differently.
        """
        return slice(0, images)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor with its mean over the processes, in place, bit-identical on all."""

    def sums(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return scalars (shape ``[]``) summed over the processes, the same on all."""
        return values

    def copy_first(self, modules: Sequence[nn.Module]) -> None:
        """Copy the parameters and buffers of these modules from the first process to all, in place."""

    def whole(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of the batch, the same on all.

        If each process computes a loss of the whole batch from them, averaging the gradients gives the right gradient.

        Args:
            rows: The rows of this process, shape ``[images, ...]``.
        """
        return rows

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Return a context in which all processes draw the same, as one device would at the start of the step.

        Losses of the whole batch that draw (a mask per image) need it: every process computes them, and the gradients
        are averaged.
        """
        if self.size == 1:
            yield
            return
        import torch

        is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        devices = [torch.cuda.current_device()] if is_used else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.step_seed)
            yield

    def on_whole_batches(self) -> AbstractContextManager[object]:
        """Return a context in which every process computes on whole batches, so batch norm need not gather."""
        return nullcontext()

    def training(self, modules: Sequence[nn.Module]) -> AbstractContextManager[object]:  # noqa: ARG002
        """Return the context in which these modules train: batch norm uses the statistics of whole batches."""
        return nullcontext()


_ONE = Engine()
_current: list[Engine] = [_ONE]


def current() -> Engine:
    """Return the engine of this process: one device, unless it has joined others."""
    return _current[-1]


@contextmanager
def using(engine: Engine) -> Iterator[Engine]:
    """Make an engine the current one within a block."""
    _current.append(engine)
    try:
        yield engine
    finally:
        _current.pop()


def alone() -> AbstractContextManager[Engine]:
    """Return a context in which this process works as on one device, without waiting for others."""
    return using(_ONE)


def shared_rows(images: int, rank: int, size: int, most: int | None = None) -> slice:
    """Return the rows of a batch that a process takes: contiguous ones, so that images keep their successors.

    Args:
        images: Number of images in the whole batch.
        rank: Rank of the process, from 0.
        size: Number of processes.
        most: Number of images that there are, which bounds the size of a batch; None if it is not known.

    Raises:
        ValueError: If they cannot be divided evenly.

    Example:
        >>> shared_rows(6, 1, 2)
        slice(3, 6, None)
    """
    if images % size:
        below, above = images // size * size, (images // size + 1) * size
        possible = [str(one) for one in (below, above) if one and (most is None or one <= most)]
        choices = " or ".join(possible) or f"{above}, and give as many images"
        why = " (all that there are)" if images == most else ""
        raise ValueError(
            f"a batch of {images} images{why} cannot be divided evenly among {size} devices, and uneven shares would "
            f"weight images differently; set data.batch_size to a multiple of {size} (e.g. {choices})"
        )
    share = images // size
    return slice(rank * share, (rank + 1) * share)


def agree(values: Mapping[str, Any], engine: Engine, what: str) -> None:
    """Raise unless all processes see the same values.

    Args:
        values: Names and texts that each process sees.
        engine: The engine of the processes.
        what: Names the values in the error.

    Raises:
        ValueError: If they differ; names the first process that sees something else.
    """
    texts = engine.texts(repr(sorted(values.items())))
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"{what}: process 0 sees {texts[0]}, process {rank} sees {text}; all processes of a training need the "
                f"same run folder (a file system that all machines share), the same config and the same images"
            )
