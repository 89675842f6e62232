"""The result of a trained role: its accuracies and times, written next to its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkd.config import DataConfig
from qkd.data import Splits
from qkd.files import write_json
from qkd.nets.own.spelling import net_title
from qkd.training import FitResult, accuracy
from qkd.training.evaluate import scored_images


@dataclass(frozen=True)
class Outcome:
    """The content of a ``result.json``.

    Args:
        role: ``teacher``, ``student`` or ``student_float``.
        net: Name of the net.
        test_accuracy: Accuracy on the test images with the weights that were kept, as a fraction.
        val_accuracy: Accuracy on the validation images with the same weights; None without a validation part.
        epochs: Length of the training; 0 for weights used unchanged.
        seconds: Time spent in training steps.
        images_per_second: Training images per second of that time; None without training.
        parameters: Number of parameters of the net.
        details: More keys of the file.
    """

    role: str
    net: str
    test_accuracy: float
    val_accuracy: float | None
    epochs: int
    seconds: float
    images_per_second: float | None
    parameters: int
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        values = asdict(self)
        return {**{key: value for key, value in values.items() if key != "details"}, **values["details"]}


def score(
    role: str, net: str, model: nn.Module, splits: Splits, data: DataConfig, fitted: FitResult | None, **details: Any
) -> Outcome:
    """Score a finished net: the only place where test images are read.

    Args:
        role: As in :class:`Outcome`.
        net: Name of the net.
        model: The net, on the device for its images.
        splits: The data set.
        data: Batch sizes.
        fitted: Its training; None for weights used unchanged.
        **details: More keys of the result; ``parameters`` overrides the count.

    Raises:
        ValueError: If there are no test images.
    """
    device = next(model.parameters()).device
    test_accuracy = accuracy(model, splits.test, splits, data, device)
    if test_accuracy is None:
        raise ValueError("the data set has no test images, so there is no accuracy to report; add some")
    count = details.pop("parameters", None)
    details |= {} if fitted is None or fitted.kept_epoch is None else {"kept_epoch": fitted.kept_epoch}
    details |= {} if data.batch_statistics is None else {"batch_statistics": data.batch_statistics}
    details |= {"test_images": scored_images(splits.test, data), "chance_accuracy": _chance(splits)}
    return Outcome(
        role=role,
        net=net_title(net),
        test_accuracy=test_accuracy,
        val_accuracy=accuracy(model, splits.val, splits, data, device),
        epochs=fitted.epochs if fitted else 0,
        seconds=fitted.seconds if fitted else 0.0,
        images_per_second=fitted.images_per_second if fitted else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()) if count is None else count,
        details=details,
    )


def _chance(splits: Splits) -> float:
    """Return the accuracy of always predicting the most frequent class of the test images."""
    return int(torch.bincount(torch.as_tensor(splits.test.labels).long()).max()) / len(splits.test)


def write_outcome(folder: Path, outcome: Outcome) -> Path:
    """Write ``result.json`` and return its path."""
    path = folder / "result.json"
    write_json(path, outcome.to_json())
    return path
