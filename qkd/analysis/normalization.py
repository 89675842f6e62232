"""Warn if given weights see other images than they were trained on; nothing else reports a wrong mean and std."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from qkd.data import Splits, normalize
from qkd.data.splits import Split
from qkd.progress import Progress
from quantizers.modes import evaluating

SAMPLE = 512  # training images: an accuracy of a half is good to 2 points there
BATCH = 64
FAR = 0.05  # a better accuracy than ours by so much, and by more than chance explains, is another normalization's
NEAR_CHANCE = 2.0  # times the accuracy of always naming one class
LARGEST_SHIFT = 1.0  # standard deviations between a channel's running mean and its mean here, as a median
LARGEST_SPREAD = 3.0  # factor between its running std and its std here, as a median

Sample: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""Raw images and labels in batches."""

# what images are commonly normalized with, by name; one value stands for every channel
COMMON = {
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "-1 to 1": ((0.5,), (0.5,)),
    "0 to 1": ((0.0,), (1.0,)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "MNIST's": ((0.1307,), (0.3081,)),
    "0 to 255": ((0.0,), (1 / 255,)),
}


@dataclass(frozen=True)
class Fit:
    """How well a net fits normalized images.

    Args:
        accuracy: Of the sample, a fraction.
        chance: Accuracy of always naming the sample's most frequent class.
        shift: Median over a batch norm's channels, of the first one: distance of the means, in running stds; None
            without batch norm.
        spread: Likewise: factor between the stds, at least 1.
    """

    accuracy: float
    chance: float
    shift: float | None = None
    spread: float | None = None


def warn_of_normalization(net: nn.Module, splits: Splits, progress: Progress) -> None:
    """Warn if a net with given weights does much better with another mean and std, or is near chance.

    A sample of training images is scored with the run's mean and std and with what is common elsewhere; the first
    batch norm's running statistics are compared with what it sees here. Test images are not looked at.

    Args:
        net: With the given weights; its modes are restored.
        splits: The run's images.
        progress: Receives the warnings.
    """
    sample = list(_sample(splits.train, next(net.parameters()).device))
    ours, others = _fit(net, sample, splits.mean, splits.std), dict(_others(net, splits, sample))
    best = max(others, key=lambda name: others[name].accuracy, default="")
    if best and others[best].accuracy > ours.accuracy + _margin(others[best].accuracy, len(splits.train)):
        mean, std = _values(best, splits.channels)
        progress.warn(
            f"teacher: its weights classify {_percent(others[best].accuracy)} of a sample of the training images "
            f"normalized as {best}, but {_percent(ours.accuracy)} with this run's mean and std: were they trained with "
            f"data.mean={_listed(mean)} data.std={_listed(std)}?"
        )
        return
    if ours.accuracy < min(NEAR_CHANCE * ours.chance, (1 + ours.chance) / 2):
        progress.warn(
            f"teacher: its weights classify {_percent(ours.accuracy)} of a sample of the training images, near the "
            f"{_percent(ours.chance)} of always naming one class: are they for these classes, in this order, and for "
            f"images with this mean and std (data.mean, data.std, data.preprocess)?"
        )
        return
    if ours.shift is not None and ours.spread is not None and _is_off(ours.shift, ours.spread):
        progress.warn(
            f"teacher: its first batch norm sees other values than its statistics say (means {ours.shift:.1f} standard "
            f"deviations off, spread by a factor of {ours.spread:.1f}): were its weights trained with another mean and "
            f"std (data.mean, data.std, data.preprocess)?"
        )


def _others(net: nn.Module, splits: Splits, sample: Sample) -> Iterator[tuple[str, Fit]]:
    for name in COMMON:
        mean, std = _values(name, splits.channels)
        if not _are_close(mean, splits.mean) or not _are_close(std, splits.std):
            yield name, _fit(net, sample, mean, std)


def _values(name: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std per channel; those of colors are averaged for gray images."""
    found = []
    for values in COMMON[name]:
        one = sum(values) / len(values)
        found.append(values if len(values) == channels else (one,) * channels)
    return found[0], found[1]


def _fit(net: nn.Module, sample: Sample, mean: tuple[float, ...], std: tuple[float, ...]) -> Fit:
    norm = next((one for one in net.modules() if isinstance(one, nn.BatchNorm1d | nn.BatchNorm2d)), None)
    seen: list[Tensor] = []
    hook = None if norm is None else norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    right, labels_seen = 0, list[Tensor]()
    try:
        with evaluating(net), torch.no_grad():
            for images, labels in sample:
                right += int((net(normalize(images, mean, std)).argmax(1) == labels).sum())
                labels_seen.append(labels.cpu())
    finally:
        if hook is not None:
            hook.remove()
    all_labels = torch.cat(labels_seen)
    count = len(all_labels)
    found = Fit(right / count, int(torch.bincount(all_labels).max()) / count)
    return found if norm is None or not seen else dataclasses.replace(found, **_distance(norm, seen))


def _sample(split: Split, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    count = min(len(split), SAMPLE)
    for chunk in torch.split(torch.arange(count) * len(split) // count, BATCH):
        yield split.batch(chunk, device)


def _distance(norm: nn.Module, seen: list[Tensor]) -> dict[str, float]:
    """Return the distance of a batch norm's inputs from its running statistics, as medians over its channels."""
    mean, var = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return {}
    values = torch.cat([one.transpose(0, 1).flatten(1) for one in seen], 1).double()
    std = var.double().sqrt().clamp(min=1e-6)
    shift = ((values.mean(1) - mean) / std).abs()
    spread = (values.std(1).clamp(min=1e-6) / std).log().abs()
    return {"shift": float(shift.median()), "spread": math.exp(min(float(spread.median()), 50.0))}


def _is_off(shift: float, spread: float) -> bool:
    return shift > LARGEST_SHIFT or spread > LARGEST_SPREAD


def _margin(accuracy: float, images: int) -> float:
    """Return how much better another one must be: three standard deviations of a sample, at least 5 points."""
    return max(FAR, 3 * math.sqrt(max(accuracy * (1 - accuracy), 0.01) / max(1, min(images, SAMPLE))))


def _are_close(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(abs(a - b) < 0.02 for a, b in zip(one, other, strict=True))


def _listed(values: tuple[float, ...]) -> str:
    return "[" + ",".join(f"{value:.4g}" for value in values) + "]"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"
