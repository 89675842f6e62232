"""Read a net's outputs for the unaugmented images of a split: logits, and features at a tap or before the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from qkd.config import DataConfig
from qkd.data import Splits, iterate, normalize
from qkd.data.sampling import stratified_quotas, take_quotas
from qkd.data.splits import Split
from qkd.progress import Tracker
from qkd.terms.last_layer import LinearCalls
from qkd.terms.taps import Taps
from quantizers.modes import evaluating


@dataclass(frozen=True)
class NetOutputs:
    """Outputs of a net, on the CPU.

    Args:
        logits: float32, shape ``[images, classes]``.
        features: float32, shape ``[images, ...]``; None where the net has no linear layer and no tap was named.
        labels: int64, shape ``[images]``.
    """

    logits: Tensor
    features: Tensor | None
    labels: Tensor


class LastInput:
    """Reads the input of the linear layer that gives the logits, or else of the last one to run.

    A context manager, with no hook outside the block.

    Args:
        model: The net.
        role: For errors.

    Raises:
        ValueError: If the net has no linear layer.
    """

    def __init__(self, model: nn.Module, *, role: str = "model") -> None:
        if not _has_linear(model):
            raise ValueError(f"the {role} has no linear layer; name a module whose output to read (--tap)")
        self._model, self._role, self._calls = model, role, LinearCalls(model)

    @contextmanager
    def reading(self) -> Iterator[LastInput]:
        """Hold the hooks within a block."""
        with self._calls.reading():
            yield self

    def take(self, logits: object) -> tuple[nn.Linear, Tensor]:
        """Return the layer and its input in the latest forward pass.

        Args:
            logits: What the pass returned, itself.

        Raises:
            RuntimeError: If none ran.
        """
        found = self._calls.take(logits, or_last=True)
        if found is None:
            raise RuntimeError(f"no linear layer of the {self._role} ran in the forward pass")
        return cast(nn.Linear, self._model.get_submodule(found[0])), found[1]


def last_linear(model: nn.Module, example: Tensor, *, role: str = "model") -> nn.Linear:
    """Return the linear layer that gives the logits, or else the last one to run.

    Args:
        model: The net; it is run once, in eval mode.
        example: Normalized images, shape ``[batch, channels, height, width]``.
        role: For errors.

    Raises:
        ValueError: If the net has no linear layer.
    """
    last = LastInput(model, role=role)
    with evaluating(model), torch.no_grad(), last.reading():
        logits = model(example)
    return last.take(logits)[0]


def read_outputs(
    model: nn.Module,
    split: Split,
    splits: Splits,
    data: DataConfig,
    device: torch.device,
    *,
    indices: Tensor | None = None,
    tap: str | None = None,
    tap_paths: Mapping[str, str] | None = None,
    role: str = "model",
    tracker: Tracker | None = None,
) -> NetOutputs:
    """Run a net in eval mode over images without augmentation, in batches.

    Args:
        model: On ``device``; its modes are restored.
        split: The images.
        splits: The set they belong to, for mean and standard deviation.
        data: Batch size and workers.
        device: Where to run.
        indices: Positions in ``split``; default: all, in order.
        tap: Module path whose output to read; default: the input of the linear layer that gives the logits, or else of
            the last one to run.
        tap_paths: For a student: float module path -> path in it.
        role: For errors.
        tracker: Counts the images.

    Raises:
        ValueError: If the tap names no module, there is no image, or an output is not finite.
    """
    places = torch.arange(len(split)) if indices is None else indices
    if len(places) == 0:
        raise ValueError("there are no images to read: the split is empty")
    taps = Taps(model, () if tap is None else (tap,), translate=tap_paths, role=role)
    last = LastInput(model, role=role) if tap is None and _has_linear(model) else None
    parts: list[tuple[Tensor, Tensor | None, Tensor]] = []
    with evaluating(model), torch.no_grad(), taps, nullcontext() if last is None else last.reading():
        for images, labels in iterate(
            split, places, data.eval_batch_size, device, drop_last=False, workers=data.workers
        ):
            logits = model(normalize(images, splits.mean, splits.std))
            features = taps.take()[tap] if tap is not None else None if last is None else last.take(logits)[1]
            parts.append((logits.float().cpu(), None if features is None else features.float().cpu(), labels.cpu()))
            if tracker is not None:
                tracker.update(len(labels))
    read = [part[1] for part in parts if part[1] is not None]
    logits, features = torch.cat([part[0] for part in parts]), torch.cat(read) if read else None
    for what, values in (("logits", logits), ("features", features)):
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"the {what} of the {role} are not all finite: its training diverged, or it has not begun")
    return NetOutputs(
        logits,
        features,
        torch.cat([part[2] for part in parts]),
    )


def some_images(split: Split, limit: int | None, generator: torch.Generator) -> Tensor:
    """Return positions of at most ``limit`` images of a split, stratified by class, sorted; all where it is None.

    Args:
        split: Whose images.
        limit: Positive, or None.
        generator: Draws which.
    """
    if limit is None or limit >= len(split):
        return torch.arange(len(split))
    quotas = stratified_quotas(torch.bincount(split.labels), limit)
    return take_quotas(split.labels, quotas, generator)[0]


def _has_linear(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) for module in model.modules())
