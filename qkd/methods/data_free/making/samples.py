"""Samples of made images: kept by epoch as arrays, shown as a grid."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qkd.files import make_folder, write_bytes

FOLDER = "samples"  # in a generator's folder
SHOWN = 32  # images of a sample
MOST_SAMPLES = 10  # epochs of a training with a sample, besides the last
GAP = 1  # pixels between the images of a grid


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return normalized images as uint8, on the same device; values out of range are clipped.

    Args:
        images: Float, shape ``[batch, channels, height, width]``.
        mean: Per channel, fractions of the full range.
        std: Likewise.
    """
    shape = (1, -1, 1, 1)
    scale = torch.tensor(std, dtype=images.dtype, device=images.device).view(shape)
    offset = torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)
    return ((images * scale + offset) * 255).round().clamp(0, 255).to(torch.uint8)


def write_arrays(path: Path, **arrays: npt.NDArray[np.generic]) -> str:
    """Write arrays as an npz file atomically; return its SHA-256. Nothing in it is pickled."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Return the arrays of an npz file.

    Raises:
        ValueError: If it is damaged, or holds anything but plain arrays.
        OSError: If it cannot be read.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: not an npz file of plain arrays ({error}); delete it to regenerate it") from error


def write_sample(folder: Path, epoch: int, images: Tensor) -> Path:
    """Write a sample of an epoch; return its file.

    Args:
        folder: Folder of the generator.
        epoch: Number of finished epochs.
        images: uint8, shape ``[batch, channels, height, width]``.
    """
    path = make_folder(folder / FOLDER) / f"epoch_{epoch:05d}.npz"
    write_arrays(path, images=images.cpu().numpy())
    return path


def sample_files(folder: Path) -> list[Path]:
    """Return the samples of a generator's or a pool's folder, in order."""
    return sorted((folder / FOLDER).glob("epoch_*.npz"))


def read_sample(path: Path) -> npt.NDArray[np.uint8]:
    """Return the images of a sample: uint8, shape ``[batch, channels, height, width]``.

    Raises:
        ValueError: If it is damaged, or holds anything else.
        OSError: If it cannot be read.
    """
    images = read_arrays(path).get("images")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"{path}: not a sample of images; delete it")
    return images.astype(np.uint8, copy=False)


def epoch_of(path: Path) -> int:
    """Return how many epochs were done when a sample was written, from its file's name."""
    return int(path.stem.rpartition("_")[2])


def is_sampled(epoch: int, epochs: int) -> bool:
    """Return whether an epoch of a training, from 0, starts with a sample: the first one and a few of the rest do."""
    return epoch % max(1, -(-epochs // MOST_SAMPLES)) == 0


def grid_png(rows: Sequence[npt.NDArray[np.uint8]], scale: int = 2) -> bytes:
    """Return rows of images as a PNG file, on white.

    Args:
        rows: uint8, shape ``[images, channels, height, width]`` each, all of the same size.
        scale: Output pixels per image pixel.

    Raises:
        ValueError: If there are no images, or their sizes differ.
    """
    from PIL import Image

    if not rows or len({row.shape[1:] for row in rows}) > 1 or min(len(row) for row in rows) == 0:
        raise ValueError(f"needs rows of images of the same size, got {[row.shape for row in rows]}")
    channels, height, width = rows[0].shape[1:]
    across = max(len(row) for row in rows)
    canvas = np.full(
        (len(rows) * (height + GAP) + GAP, across * (width + GAP) + GAP, channels), 255, dtype=np.uint8
    )  # fmt: skip
    for line, row in enumerate(rows):
        for column, image in enumerate(row):
            top, left = GAP + line * (height + GAP), GAP + column * (width + GAP)
            canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
