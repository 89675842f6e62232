"""Batches of a split in the requested order, read from memory or decoded by worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qkd.data.errors import DataError
from qkd.data.splits import Split
from qkd.machine import usable_cpus


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    r"""Return images as the nets see them: :math:`(x / 255 - \mu_c) / \sigma_c` for each channel.

    Args:
        images: uint8, shape ``[batch, channels, height, width]``.
        mean: Per channel, fraction 0..1.
        std: Per channel, fraction, positive.

    Returns:
        float32, same shape and device.

    Raises:
        TypeError: If ``images`` are not uint8.
        ValueError: If the length of ``mean`` or ``std`` is not the number of channels, or a ``std`` is not positive.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    channels = images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(f"images have {channels} channels, but mean has {len(mean)} and std has {len(std)}")
    if min(std) <= 0:
        raise ValueError(f"std must be positive, got {tuple(std)}")
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(1, -1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(1, -1, 1, 1)
    return images.to(torch.float32).mul_(scale).sub_(shift)


def iterate(
    split: Split,
    indices: Tensor,
    batch_size: int,
    device: torch.device | str,
    *,
    drop_last: bool,
    workers: int = 0,
    following: int = 0,
    part: slice | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images at ``indices`` in batches, in exactly that order, whatever the number of workers.

    No global random state is read or changed.

    Args:
        split: The source of the images.
        indices: Positions in ``split``, int64, shape ``[n]``; a slice of an epoch's order starts in mid-epoch.
        batch_size: Images per batch, positive.
        device: Device of the batches.
        drop_last: Drop the last batch if it is not full.
        workers: Decoding processes, at most one per core; ignored if the split is in memory.
        following: This many images after a batch are appended to it and repeated in the next one; no batch starts at
            the last ``following`` indices.
        part: Rows of each full batch to return, with those that follow them; None for all. Only with ``drop_last``.

    Yields:
        ``(images, labels)``: uint8 ``[batch, channels, height, width]`` and int64 ``[batch]``, plus ``following`` rows.

    Raises:
        ValueError: If ``batch_size`` is not positive, or ``workers`` or ``following`` is negative.
        DataError: If an image cannot be read.
    """
    if batch_size < 1 or workers < 0 or following < 0:
        raise ValueError(
            f"batch_size must be positive, workers and following not negative, got {batch_size=}, {workers=}, "
            f"{following=}"
        )
    count = max(0, len(indices) - following)
    end = count - count % batch_size if drop_last else count
    first, stop, _ = slice(None).indices(batch_size) if part is None else part.indices(batch_size)
    chunks = [indices[start + first : start + stop + following].cpu() for start in range(0, end, batch_size)]
    if split.decodes and workers and len(chunks) > 1:
        workers = min(workers, len(chunks), usable_cpus())  # more would only slow each other down
        return _decoded_by_workers(split, chunks, device, workers)
    return (split.batch(chunk, device) for chunk in chunks)


class _Chunks(Dataset[tuple[Tensor, Tensor] | str]):
    """A data set whose items are whole batches, so that a worker decodes one batch at a time."""

    def __init__(self, split: Split, chunks: list[Tensor]) -> None:
        self.split = split
        self.chunks = chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str:
        try:
            return self.split.batch(self.chunks[index], "cpu")
        except DataError as error:
            # Returned as a value: an exception that crosses the process boundary is wrapped in the worker's traceback.
            return str(error)


def _decoded_by_workers(
    split: Split, chunks: list[Tensor], device: torch.device | str, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    split.batch(chunks[0][:1], "cpu")  # load and compile the decoder once, not in every worker
    loader = DataLoader(
        _Chunks(split, chunks),
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # otherwise the loader draws from the global one
        pin_memory=torch.device(device).type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, str):
            raise DataError(batch)
        images, labels = batch
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
