"""Image sets as uint8 tensors on a device, and the batched crop and flip of a whole epoch."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """One part of a data set.

    Args:
        pixels: uint8, shape ``[n, channels, height, width]``.
        labels: int64, shape ``[n]``.
    """

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Images:
        """Return the same on a device."""
        return Images(self.pixels.to(device), self.labels.to(device))

    @property
    def mean(self) -> Tensor:
        """Return the mean of each channel, fractions 0..1."""
        return self.pixels.double().mean((0, 2, 3)).float() / 255

    @property
    def std(self) -> Tensor:
        """Return the standard deviation of each channel, fractions."""
        return self.pixels.double().std((0, 2, 3)).float() / 255


def read_images(folder: Path, part: str) -> Images:
    """Read ``train`` or ``test``: ``PART.npz`` (images, labels) or ``PART.packed.npz`` (lossless WebP mosaics).

    Raises:
        FileNotFoundError: If neither is there.
    """
    plain, packed = folder / f"{part}.npz", folder / f"{part}.packed.npz"
    if plain.exists():
        with np.load(plain) as file:
            pixels, labels = file["images"], file["labels"]
    elif packed.exists():
        pixels, labels = _unpack(packed)
    else:
        raise FileNotFoundError(f"{folder} has neither {plain.name} nor {packed.name}; name a folder with --data")
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    return Images(
        torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), torch.from_numpy(labels.astype(np.int64))
    )


def _unpack(file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Cut the mosaics of a packed file into images ``[n, height, width, channels]``, in the set's own order."""
    from concurrent.futures import ThreadPoolExecutor

    from PIL import Image

    with np.load(file) as stored:
        blob, ends, labels = stored["blob"].tobytes(), stored["offsets"], stored["labels"]
        count, height, width, channels = (int(value) for value in stored["shape"])
        rows, columns = (int(value) for value in stored["grid"])
        order = stored["order"].astype(np.int64) if "order" in stored.files else np.arange(count)

    def tiles(index: int) -> npt.NDArray[np.uint8]:
        picture = Image.open(io.BytesIO(blob[ends[index] : ends[index + 1]])).convert("RGB")
        mosaic = np.asarray(picture).reshape(rows, height, columns, width, channels)
        return mosaic.swapaxes(1, 2).reshape(rows * columns, height, width, channels)

    with ThreadPoolExecutor() as pool:  # Pillow decodes without the interpreter's lock
        parts = list(pool.map(tiles, range(len(ends) - 1)))
    return np.concatenate(parts)[:count][order], labels


def made_up_images(count: int, *, side: int = 32, channels: int = 3, classes: int = 10, seed: int = 0) -> Images:
    """Return learnable images for a trial run: noise around one color per class, unaffected by crops and mirroring."""
    # The colors are the same for any seed, so that training and test images show the same classes.
    pictures = torch.rand(classes, channels, 1, 1, generator=torch.Generator().manual_seed(1234))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    noise = torch.rand(count, channels, side, side, generator=generator)
    return Images((255 * (0.4 * pictures[labels] + 0.6 * noise)).to(torch.uint8), labels)


class CropFlip:
    """Crops and mirrors all images of an epoch at once, on their device.

    Args:
        images: The images to augment; a padded copy is kept as well.
        padding: Pixels on each side, of the mean color.
    """

    def __init__(self, images: Images, *, padding: int = 4) -> None:
        pixels = images.pixels
        fill = (images.mean * 255).round().to(torch.uint8).view(1, -1, 1, 1)
        height, width = pixels.shape[-2:]
        self.padding, self.labels = padding, images.labels
        self.padded = fill.repeat(len(pixels), 1, height + 2 * padding, width + 2 * padding)
        self.padded[..., padding : padding + height, padding : padding + width] = pixels
        self.height, self.width = height, width

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def views(self) -> int:
        """Return the number of crops and mirrored crops of an image."""
        return 2 * (2 * self.padding + 1) ** 2

    def view(self, index: int) -> Tensor:
        """Return one view of all images: uint8 ``[n, channels, height, width]``."""
        place, mirrored = divmod(index, 2)
        row, column = divmod(place, 2 * self.padding + 1)
        pixels = self.padded[..., row : row + self.height, column : column + self.width]
        return pixels.flip(3) if mirrored else pixels

    def epoch(self, generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``count`` images in random order, each once, cropped at random and half of them mirrored.

        Args:
            generator: On the images' device.
            count: At most the number of images.

        Returns:
            uint8 ``[count, channels, height, width]``, int64 ``[count]``, and the index of each image in a table
            ``[views * n]`` that holds one view of all images after another.
        """
        device = self.padded.device
        order = torch.randperm(len(self), generator=generator, device=device)[:count]
        offsets = torch.randint(2 * self.padding + 1, (2, count), generator=generator, device=device)
        mirrored = torch.randint(2, (count, 1), generator=generator, device=device).bool()
        across = torch.arange(self.width, device=device)
        rows = offsets[0][:, None] + torch.arange(self.height, device=device)
        columns = offsets[1][:, None] + torch.where(mirrored, self.width - 1 - across, across)
        channels = torch.arange(self.padded.shape[1], device=device)
        pixels = self.padded[
            order[:, None, None, None], channels[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]
        view = 2 * (offsets[0] * (2 * self.padding + 1) + offsets[1]) + mirrored[:, 0].long()
        return pixels, self.labels[order], view * len(self) + order


def normalizer(images: Images) -> tuple[Tensor, Tensor]:
    """Return factor and shift, ``[1, channels, 1, 1]``, of ``x * factor - shift``, the input of nets."""
    mean, std = images.mean, images.std
    return (1 / (255 * std)).view(1, -1, 1, 1), (mean / std).view(1, -1, 1, 1)
