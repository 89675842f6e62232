"""Pick the images that go with the exported files: test images to score on, training images to calibrate on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from export import Preprocessing, Sample, sample_size, write_sample
from export.storage.preprocessing import prepared_text
from qkd.config import RunConfig
from qkd.data import DataError, Split, Splits, load_splits, normalize
from qkd.files import sha256_of
from qkd.methods.table import reads_images
from qkd.roles.images import stored_images
from qkd.seeding import stream

FILE = "sample.npz"
BATCH = 64  # images per forward pass


def write_run_sample(folder: Path, nets: Mapping[str, nn.Module], splits: Splits, preprocessing: Preprocessing) -> Path:
    """Write test images, spread evenly over the test set, with labels and the logits of the trained nets.

    The expected logits are those of PyTorch (the student in its deployed arithmetic), not the results of a runtime.

    Args:
        folder: The folder of the exported files.
        nets: Name of an exported file -> the net it came from, in eval mode, on the CPU.
        splits: The data set.
        preprocessing: How its images become the input of the nets.

    Raises:
        export.ExportError: If the file cannot be written.
    """
    images, labels = evenly(splits.test, splits, 256)
    logits = {name: _logits(net, images) for name, net in nets.items()}
    files = {name: folder / f"{name}.onnx" for name in nets}
    hashes = {name: sha256_of(path) for name, path in files.items() if path.is_file()}
    numbers = labels.numpy().astype(np.int64)
    return write_sample(folder / FILE, Sample(images.numpy(), numbers, logits, prepared_text(preprocessing), hashes))


def calibration_images(config: RunConfig, count: int = 128, *, folder: Path | None = None) -> npt.NDArray[np.float32]:
    """Return training images of a run as input for a device's runtime: float32, normalized, not augmented.

    Args:
        config: The run's config.
        count: Maximum number of images.
        folder: The run folder, with whose record the images are compared. If omitted, they are not compared.

    Raises:
        qkd.data.DataError: If the images are not those that the run was started with, or its student is data-free: then
            no real image is read but to score.
    """
    if not reads_images(config):
        raise DataError(
            "int8_baseline: cannot be used for a student that sees no real image (data_free), because it calibrates on "
            "them; leave it out"
        )
    splits = load_splits(config.data, seed=config.seed) if folder is None else stored_images(config, folder)
    order = torch.randperm(len(splits.train), generator=stream(config.seed, "int8 calibration"))
    images, _ = splits.train.batch(order[:count], "cpu")
    return np.asarray(normalize(images, splits.mean, splits.std).numpy(), np.float32)


def evenly(split: Split, splits: Splits, count: int) -> tuple[Tensor, Tensor]:
    """Return at most ``count`` normalized images of a split with labels, spread evenly; fewer if they are large."""
    size = min(len(split), sample_size(splits.image_shape, count))
    picked = torch.linspace(0, len(split) - 1, size).round().long()
    images, labels = split.batch(picked, "cpu")
    return normalize(images, splits.mean, splits.std).contiguous(), labels


def _logits(net: nn.Module, images: Tensor) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        outputs = [net(part) for part in torch.split(images, BATCH)]
    return np.asarray(torch.cat([getattr(one, "value", one) for one in outputs]).numpy(), np.float32)
