"""CIFAR-10/100, Fashion-MNIST, MNIST and SVHN, read (and, with a network, downloaded) by torchvision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qkd.data.errors import DataError
from qkd.data.splits import MemorySplit, Parts

_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@dataclass(frozen=True)
class VisionSet:
    """A torchvision data set: its class there, its files, and their folder under ``root``."""

    title: str
    dataset: str
    folder: str
    files: tuple[str, ...]
    unpack: bool = False


VISION_SETS = {
    "cifar10": VisionSet("CIFAR-10", "CIFAR10", ".", ("cifar-10-python.tar.gz",), unpack=True),
    "cifar100": VisionSet("CIFAR-100", "CIFAR100", ".", ("cifar-100-python.tar.gz",), unpack=True),
    "fashion-mnist": VisionSet("Fashion-MNIST", "FashionMNIST", "FashionMNIST/raw", _IDX_FILES, unpack=True),
    "mnist": VisionSet("MNIST", "MNIST", "MNIST/raw", _IDX_FILES, unpack=True),
    "svhn": VisionSet("SVHN", "SVHN", ".", ("train_32x32.mat", "test_32x32.mat")),
}


def load_vision_splits(name: str, root: Path, *, download: bool) -> Parts:
    """Load the parts of a torchvision data set.

    Note: torchvision stores CIFAR as pickles. It compares their MD5 sums with built-in ones before opening them, so
    only the published files are ever unpickled.

    Args:
        name: A key of ``VISION_SETS``.
        root: Folder that holds (or receives) the set.
        download: Download missing files.

    Returns:
        Both parts, in memory, and the classes by name.

    Raises:
        DataError: If the files are damaged, or are missing and must not or cannot be downloaded; the message names
            them and their folder.
    """
    spec = VISION_SETS[name]
    train = _open(spec, root, train=True, download=download)
    test = _open(spec, root, train=False, download=download)
    return Parts(_as_split(train), _as_split(test), _class_names(train))


def _open(spec: VisionSet, root: Path, *, train: bool, download: bool) -> Any:
    from torchvision import datasets

    build: Callable[..., Any] = getattr(datasets, spec.dataset)
    part = {"split": "train" if train else "test"} if spec.dataset == "SVHN" else {"train": train}
    try:
        return build(root=str(root), download=download, **part)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(_missing(spec, root, download=download, reason=error)) from error


def _missing(spec: VisionSet, root: Path, *, download: bool, reason: Exception) -> str:
    folder = (root / spec.folder).resolve()
    tried = "could not be read or downloaded" if download else "is missing, and data.download is false"
    unpacked = " (torchvision unpacks them there when data.download is true)" if spec.unpack else ""
    return (
        f"{spec.title} {tried}: {' '.join(str(reason).split())}. Without a network, put {', '.join(spec.files)} "
        f"into {folder}{unpacked}, or set data.root to the folder that holds them; delete damaged files there"
    )


def _as_split(dataset: Any) -> MemorySplit:
    labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets  # an array, a tensor or a list
    return MemorySplit(_channels_first(dataset.data), torch.as_tensor(labels).to(torch.int64))


def _channels_first(data: Tensor | np.ndarray[Any, Any]) -> Tensor:
    images = data if isinstance(data, Tensor) else torch.from_numpy(np.ascontiguousarray(data))
    if images.dim() == 3:  # MNIST and its like: [n, height, width]
        return images.unsqueeze(1)
    is_channels_last = images.shape[-1] == 3 and images.shape[1] != 3  # CIFAR; SVHN comes channels first
    return images.permute(0, 3, 1, 2).contiguous() if is_channels_last else images


def _class_names(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    return tuple(names) if names else tuple(str(digit) for digit in range(10))
