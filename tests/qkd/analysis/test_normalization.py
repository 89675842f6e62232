"""A teacher that is used as given is warned of where its weights saw other images."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from qkd.analysis.normalization import warn_of_normalization
from qkd.data import MemorySplit, Splits
from qkd.progress import Progress


class Bright(nn.Module):
    """Tells bright images from dark ones by the sign of their mean: right where 0 is in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        level = self.scale * x.flatten(1).mean(1)
        return torch.stack([-level, level], 1)


def splits(mean: float, std: float, channels: int = 1) -> Splits:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    levels = torch.where(labels.bool(), 190, 60).view(-1, 1, 1, 1)
    images = (levels + torch.randint(-30, 30, (64, channels, 4, 4), generator=generator)).to(torch.uint8)
    part = MemorySplit(images, labels)
    return Splits(part, part, part, ("dark", "bright"), channels, 4, (mean,) * channels, (std,) * channels, "made")


def warned(net: nn.Module, images: Splits) -> str:
    stream = io.StringIO()
    warn_of_normalization(net, images, Progress(stream))
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_another_normalization_that_does_better_is_named(channels: int) -> None:
    text = warned(Bright(), splits(0.0, 1.0, channels))
    assert "classify 100 % of a sample of the training images normalized as" in text and "but 50 % with this" in text
    assert f"data.mean=[{','.join(['0.5'] * channels)}]" in text or "data.mean=[0.4" in text


def test_nothing_is_said_where_all_is_well() -> None:
    net = Bright().train()
    assert warned(net, splits(0.5, 0.25)) == ""
    assert net.training


def test_weights_near_chance_are_said() -> None:
    net = Bright()
    with torch.no_grad():
        net.scale.fill_(0.0)
    assert "near the 50 % of always naming one class: are they for these classes" in warned(net, splits(0.5, 0.25))


def test_statistics_of_batch_norm_tell_where_accuracy_does_not() -> None:
    """A net that sees only signs is right with any scale; what it was trained on is in its statistics."""
    norm = nn.BatchNorm2d(1)
    net = nn.Sequential(norm, Bright())
    images = splits(0.5, 0.5)
    with torch.no_grad():
        norm.running_var.fill_(100.0**2)
    text = warned(net, images)
    assert "first batch norm sees other values than its statistics say" in text and "data.preprocess" in text
    with torch.no_grad():
        norm.running_var.fill_(0.25)
    assert warned(net, images) == ""
