"""Checks, before training, that the recording of a network has the network's own gradients.

Both run one forward and one backward pass in training mode: a random direction is drawn for every output, and the
gradients of the images, and of the parameters that the recorded graph uses directly, are compared. Drop-out is the
identity in both, and batch norm uses its running statistics, so nothing is random and no small variance amplifies
rounding. What remains is float rounding, and units that it moves across a kink of an activation: ``TOLERANCE`` of the
norm (root of the sum of squares) of a gradient, whereas missing one path of two, or a factor, is of the order of 1. A
gradient below ``NEGLIGIBLE`` of the largest is cancellation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from quantizers.graph.form.canonical import StopGradient
from quantizers.graph.form.kinds import is_pass
from quantizers.graph.form.refusal import RewriteError
from quantizers.graph.proving.repeated import steady
from quantizers.graph.recording.modes import live_nodes, output_of
from quantizers.graph.recording.outcome import Recording
from quantizers.graph.recording.returned import tensors

TOLERANCE = 1e-3
NEGLIGIBLE = 1e-6
WAY_OUT = (
    "a student is trained through the operations themselves; remove what changes gradients from the network (freeze "
    "layers with requires_grad_(False), scale rates or losses outside), or use detach() on whole tensors"
)

Gradients = list[Tensor | None]


def require_same_gradients(root: nn.Module, recording: Recording, images: Tensor, notes: list[str]) -> None:
    """Compare the gradients of a network with those of its recording in training mode.

    A network that fails in the backward pass cannot be trained, so it is not a reference; nor is one without gradients.

    Args:
        root: A copy of the recorded network, in training mode and in its earlier state, with its parameters.
        recording: Its recording.
        images: The images of the recording.
        notes: Operations of the network that may change gradients, with their locations.

    Raises:
        RewriteError: If they differ.
    """
    live = live_nodes(recording.graph, output_of(recording.graph))
    named = _shared(root, recording, live)
    ends = _ends(recording)
    cotangents = [None if end is None else _direction(number, shape) for number, (end, shape) in enumerate(ends)]
    parameters = [parameter for _, parameter in named]
    expected = _of_network(root, images, cotangents, parameters)
    if expected is None:
        return
    found = _of_recording(recording, live, images, [end for end, _ in ends], cotangents, parameters)
    largest = max((float(g.norm()) for g in expected if g is not None), default=0.0)
    for name, own, other in zip(["the images", *(f"`{n}`" for n, _ in named)], expected, found, strict=True):
        error = _distance(own, other, NEGLIGIBLE * largest)
        if error > TOLERANCE:
            raise RewriteError(_message(type(root).__name__, name, error, notes))


def _message(network: str, name: str, error: float, notes: list[str]) -> str:
    cause = f" (found: {'; '.join(notes)})" if notes else ""
    if not notes and name.startswith("`"):
        cause = " (a parameter used directly, and also detached or in a weight computed from it, would diverge)"
    return (
        f"{network}: in training, the student would have other gradients than the float network{cause}: that of {name} "
        f"differs by {error:.0%}; {WAY_OUT}; prepare(..., verify=False) skips this check"
    )


def _shared(root: nn.Module, recording: Recording, live: list[fx.Node]) -> list[tuple[str, nn.Parameter]]:
    """Return the learned parameters that the recorded graph uses directly.

    One that it also uses detached, or through a weight computed from it, has another gradient in the student.
    """
    modules = [recording.modules[str(node.target)] for node in live if node.op == "call_module"]
    used = {id(parameter) for module in modules for parameter in module.parameters()}
    return [(n, p) for n, p in root.named_parameters() if p.requires_grad and id(p) in used]


def _ends(recording: Recording) -> list[tuple[fx.Node | None, tuple[int, ...]]]:
    """Return the node of each output that has a low-bit form, or None."""
    leaves = [leaf for leaf in pytree.tree_leaves(output_of(recording.graph)) if isinstance(leaf, fx.Node)]
    sound = [leaf for leaf in leaves if all("refused" not in node.meta for node in live_nodes(recording.graph, leaf))]
    return [(leaf if leaf in sound else None, tuple(leaf.meta["shape"])) for leaf in leaves]


def _direction(number: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def _total(outputs: list[Any], cotangents: list[Tensor | None]) -> Tensor | None:
    """Return the outputs along the directions, or None if no gradient reaches any or they are not finite."""
    terms = [
        (output * cotangent.to(output)).sum()
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if cotangent is not None and isinstance(output, Tensor) and output.requires_grad
    ]
    total = torch.stack(terms).sum() if terms else None
    return total if total is not None and bool(torch.isfinite(total)) else None


def _distance(own: Tensor | None, other: Tensor | None, floor: float) -> float:
    if own is None or other is None:
        present = own if own is not None else other
        return 0.0 if present is None or float(present.norm()) <= floor else 1.0
    size = float(own.norm())
    error = float((own - other).norm())
    return 0.0 if error <= floor else error / max(size, floor)


# -- the network -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _own_gradients(root: nn.Module) -> Iterator[None]:
    """Preserve the gradients of the parameters."""
    before = [(parameter, parameter.grad) for parameter in root.parameters()]
    for parameter, _ in before:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _of_network(
    root: nn.Module, images: Tensor, cotangents: list[Tensor | None], parameters: list[nn.Parameter]
) -> Gradients | None:
    source = images.detach().clone().requires_grad_()
    with torch.enable_grad(), _own_gradients(root), steady(root):
        try:
            leaves = tensors(root(source.clone()))
            total = _total(leaves, cotangents)
            if total is None:
                return None
            total.backward()  # type: ignore[no-untyped-call] # not autograd.grad: checkpoints refuse that
        except RuntimeError:
            return None
        return [source.grad, *(parameter.grad for parameter in parameters)]


# -- the recording -----------------------------------------------------------------------------------------------------


def _of_recording(
    recording: Recording, live: list[fx.Node], images: Tensor, ends: list[fx.Node | None],
    cotangents: list[Tensor | None], parameters: list[nn.Parameter],
) -> Gradients:  # fmt: skip
    source = images.detach().clone().requires_grad_()
    wanted = {node for end in ends if end is not None for node in live_nodes(recording.graph, end)}
    values: dict[fx.Node, Any] = {}
    with torch.enable_grad():
        for node in live:
            if node.op == "placeholder":
                values[node] = source
            elif node in wanted:
                module = recording.modules[str(node.target)]
                values[node] = _applied(module, [values[operand] for operand in node.args])  # type: ignore[index]
        total = _total([values.get(end) if end is not None else None for end in ends], cotangents)
        if total is None:
            return [None] * (1 + len(parameters))
        return list(torch.autograd.grad(total, [source, *parameters], allow_unused=True))


def _applied(module: nn.Module, operands: list[Any]) -> Any:
    if isinstance(module, StopGradient):
        return operands[0].detach()
    return operands[0] if is_pass(module) else module.eval()(*operands)
