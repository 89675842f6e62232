"""The messages between server and clients, as values, and their size in bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from torch import Tensor, nn

Task: TypeAlias = Literal["calibrate", "train", "evaluate"]
MODEL, GENERATOR = "model/", "generator/"  # prefixes of tensor names in a message


@dataclass(frozen=True)
class Order:
    """A request of the server to a client.

    Args:
        client: Which, from 0.
        task: ``calibrate``: set scales from its images; ``train``: take local steps; ``evaluate``: score.
        server_round: From 1; the calibration is round 0.
        tensors: Name -> tensor: the global net, and what the strategy sends besides.
    """

    client: int
    task: Task
    server_round: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Reply:
    """The answer of a client.

    Args:
        client: Which.
        tensors: Name -> tensor: its net, and what the strategy wants besides; empty for scores.
        metrics: Name -> number; ``images``: how many images it has.
        error: Why it failed, in one line; empty where it did not.
    """

    client: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


Answer: TypeAlias = Callable[[str, Order], Reply]  # what a client does: a run's config as JSON, an order -> a reply


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of the tensors in a message, without names and envelopes, which depend on the engine.

    Args:
        tensors: Of an order or a reply.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a net's state, on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in net.state_dict().items()}


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with a prefix before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
