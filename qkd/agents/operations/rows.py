"""Copy some rows of a tensor, out of it or into it, in the fastest way on its device."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from qkd.agents.operations.counting import IntArray


def to_device(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on ``device``."""
    made = torch.from_numpy(values)
    return made if device.type == "cpu" else made.to(device)


def take_rows(values: Tensor, rows: IntArray) -> Tensor:
    """Return a copy of the given rows."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy().take(rows, 0))
    return values.index_select(0, to_device(rows, values.device))


def put_rows(target: Tensor, rows: IntArray, values: Tensor) -> None:
    """Write ``values`` to the given rows of ``target``, in place."""
    if target.device.type == "cpu":
        target.numpy()[rows] = values.numpy()  # a copy per row; PyTorch's indexed copy of bytes takes 30 times as long
    else:
        target.index_copy_(0, to_device(rows, target.device), values)
