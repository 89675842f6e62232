"""The record of one run of a network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn


@dataclass
class Recording:
    """What a network computed, in one mode.

    Args:
        graph: Canonical graph; every node has ``meta`` with its path, shape, and line of code.
        modules: Target -> module.
        outputs: Module path in the network -> the node of the module's output.
        result: What the network returned: the tensors themselves.
    """

    graph: fx.Graph
    modules: dict[str, nn.Module]
    outputs: dict[str, fx.Node] = field(default_factory=dict)
    result: Any = None
