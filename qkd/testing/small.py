"""The nets, images and configs that tests share, small enough to run in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.config import RunConfig
from qkd.data import MemorySplit, Splits
from qkd.data.statistics import channel_statistics
from qkd.progress import Silent
from qkd.run.folder import RunFolder
from qkd.seeding import stream
from qkd.stages import STAGES


class TinyNet(nn.Module):
    """A residual net of 3 convolutions, about 1,000 parameters: every kind of layer that the toolkit rewrites.

    Args:
        classes: Number of outputs.
        channels: Channels of the image.
        width: Channels of the convolutions.
        dropout: Share of the features dropped in training; with 0 there is no dropout layer.
    """

    def __init__(self, *, classes: int = 4, channels: int = 1, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = _block(channels, width)
        self.left = _block(width, width)
        self.right = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[batch, classes]`` of images ``[batch, channels, height, width]``."""
        x = self.stem(x)
        x = self.relu(x + self.right(self.left(x)))
        logits: Tensor = self.head(self.dropout(self.flatten(self.pool(x))))
        return logits


def synthetic_images(
    count: int, *, classes: int = 4, channels: int = 1, image_size: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return images that a net can tell apart: each class is a smooth random pattern, slightly shifted, with noise.

    Args:
        count: Number of images; classes take turns.
        classes: Number of classes.
        channels: 1 or 3.
        image_size: Side in pixels.
        seed: Seed of the shifts and the noise; the patterns are the same for every seed.

    Returns:
        ``(images, labels)``: uint8 ``[count, channels, image_size, image_size]`` and int64 ``[count]``.
    """
    patterns = torch.rand(classes, channels, 3, 3, generator=stream(0, "patterns", classes, channels))
    patterns = functional.interpolate(patterns, size=image_size, mode="bilinear", align_corners=True)
    generator = stream(seed, "synthetic images")
    labels = torch.arange(count) % classes
    is_shifted = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(is_shifted, patterns.roll(1, -1)[labels], patterns[labels])
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return ((images + noise).clamp(0, 1) * 255).to(torch.uint8), labels


def synthetic_splits(
    *,
    train: int = 64,
    val: int = 16,
    test: int = 32,
    classes: int = 4,
    channels: int = 1,
    image_size: int = 8,
) -> Splits:
    """Return a loaded data set of :func:`synthetic_images`.

    Args:
        train: Number of training images.
        val: Number of validation images.
        test: Number of test images.
        classes: Number of classes.
        channels: 1 or 3.
        image_size: Side in pixels.

    Returns:
        The three parts, with the statistics of the first.
    """
    learn, select, score = (
        MemorySplit(*synthetic_images(count, classes=classes, channels=channels, image_size=image_size, seed=number))
        for number, count in enumerate((train, val, test))
    )
    mean, std = channel_statistics(learn)
    names = tuple(f"class {label}" for label in range(classes))
    return Splits(learn, select, score, names, channels, image_size, mean, std, "synthetic")


def write_npz_set(folder: Path, *, train: int = 64, test: int = 32, classes: int = 4, image_size: int = 8) -> Path:
    """Write ``train.npz`` and ``test.npz`` of :func:`synthetic_images` to a folder, and return it.

    Args:
        folder: Where to write them; created if missing.
        train: Number of images in ``train.npz``.
        test: Number of images in ``test.npz``.
        classes: Number of classes.
        image_size: Side in pixels.

    Returns:
        The folder.

    Raises:
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate({"train": train, "test": test}.items()):
        images, labels = synthetic_images(count, classes=classes, image_size=image_size, seed=seed)
        np.savez(folder / f"{name}.npz", images=images[:, 0].numpy(), labels=labels.numpy())
    return folder


def tiny_config(data_folder: Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Return an experiment that runs in seconds on the set that :func:`write_npz_set` wrote.

    Args:
        data_folder: Where ``train.npz`` and ``test.npz`` are.
        changes: Dotted key -> value, e.g. ``{"student.train.epochs": 3}``.

    Returns:
        The experiment.

    Raises:
        ValueError: If a changed key is unknown or its value out of range (pydantic's ``ValidationError``).
    """
    values: dict[str, Any] = {
        "name": "tiny",
        "device": "cpu",
        "threads": 1,
        "data": {"name": "npz", "path": str(data_folder), "batch_size": 16, "val_fraction": 0.25},
        "teacher": {"net": "resnet8", "train": {"epochs": 2, "lr": 0.05}, "agent": _tiny_agent()},
        "student": {
            "quant": {"weight_bits": 4, "act_bits": 4},
            "train": {"epochs": 2, "lr": 0.01},
            "agent": _tiny_agent(),
            "calibration_batches": 2,
        },
        "bench": {"warmup": 1, "rounds": 5},
    }
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return RunConfig.model_validate(values)


def run_tiny(config: RunConfig, runs_dir: Path, *stages: str) -> RunFolder:
    """Run stages of an experiment, silently, and return its folder, which stays locked.

    Args:
        config: The experiment.
        runs_dir: Where its folder is created.
        stages: In order.

    Returns:
        Its folder, locked.

    Raises:
        RuntimeError: If a stage has ended but is not complete.
        OSError: If the folder cannot be written.
        ValueError: If the folder holds another experiment.
    """
    run = RunFolder.open(config, runs_dir)
    for stage in stages:
        STAGES[stage](run, Silent())
        if why := run.why_incomplete(stage):
            raise RuntimeError(f"{stage} is not complete: {why}")
    return run


def _tiny_agent() -> dict[str, Any]:
    return {"policy": "crop", "crop_padding": 1, "flip": False}


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
