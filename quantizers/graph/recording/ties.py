"""Refuses networks with two weights that are, or are computed from, one parameter: in a student, they would diverge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from quantizers.graph.form.canonical import Affine
from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.recording.modes import live_nodes, output_of
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.spelling.pen import Pen


@dataclass(frozen=True)
class _Use:
    """A parameter of a layer, and the tensor of the network that its values come from."""

    where: str
    layer: nn.Module
    parameter: nn.Parameter
    tensor: Tensor
    sources: frozenset[str]


def require_no_ties(recording: Recording, pen: Pen) -> None:
    """Raise if two layers, or weight and bias of one, have weights that are, or are computed from, one parameter.

    The student holds one parameter for each, so they would diverge after one training step. Parts of a parameter that
    do not overlap are independent anyway, and the slopes of one PReLU stay shared. Learned factors and offsets of
    activations are exempt: those become factors of each layer they meet.

    Args:
        recording: What was recorded of the network.
        pen: The pen that wrote it, which tracks where parameters come from.

    Raises:
        RewriteError: If so (names the parameter and both places).
    """
    for first, second in itertools.combinations(_uses(recording, pen), 2):
        shared = first.sources & second.sources
        is_one = first.parameter is second.parameter
        if not shared or (is_one and isinstance(first.layer, nn.PReLU)) or _are_apart(first.tensor, second.tensor):
            continue
        how = "are" if is_one else "are computed from"
        raise RewriteError(
            f"{first.where} and {second.where} {how} one parameter, `{min(shared)}`, but training a "
            "student would let them diverge, even if one of them is detached; give each layer its own parameter, or "
            "freeze that one with requires_grad_(False)"
        )


def _uses(recording: Recording, pen: Pen) -> Iterator[_Use]:
    for node in live_nodes(recording.graph, output_of(recording.graph)):
        module = _layer(recording, node)
        for name, parameter in () if module is None else module.named_parameters(recurse=False):
            _, tensor = pen.drawn_from.get(id(parameter), (parameter, None))
            if tensor is not None and (sources := pen.constant(tensor).sources):
                yield _Use(f"{node.meta['path']}.{name}", module, parameter, tensor, sources)  # type: ignore[arg-type]


def _layer(recording: Recording, node: fx.Node) -> nn.Module | None:
    module = recording.modules.get(str(node.target)) if node.op == "call_module" else None
    return None if isinstance(module, Affine) else module


def _are_apart(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors are non-overlapping views of one memory."""
    if first.untyped_storage()._cdata != second.untyped_storage()._cdata:
        return False
    size = first.untyped_storage().nbytes() // first.element_size()
    places = torch.zeros(size, dtype=torch.int8)
    for tensor in (first, second):
        flat = torch.as_strided(torch.arange(size), tensor.shape, tensor.stride(), tensor.storage_offset())
        places[torch.bincount(flat.reshape(-1), minlength=size) > 0] += 1
    return int(places.max()) < 2
