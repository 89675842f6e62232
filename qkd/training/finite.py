"""Find where a non-finite value came from: the term, the layer, the parameter.

Errors: :class:`TrainingError` (a ``RuntimeError``) ends a training that cannot continue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qkd.training.averaging import averaged_tensors


class TrainingError(RuntimeError):
    """A training stopped because a loss, gradient or weight was not finite.

    Args:
        message: For the user.
        epoch: Epoch in which it happened, from 1; 0 before the first.
        step: Step of the epoch, from 1.
        term: Loss term that is not finite, or whose gradient is not; empty if unknown.
        layer: Module or parameter where it starts; empty if unknown.
    """

    def __init__(self, message: str, *, epoch: int, step: int, term: str = "", layer: str = "") -> None:
        super().__init__(message)
        self.epoch, self.step, self.term, self.layer = epoch, step, term, layer


def non_finite_weights(model: nn.Module) -> list[str]:
    """Return the names of parameters and batch-norm statistics that hold NaN or an infinity, in model order."""
    return [name for name, tensor in averaged_tensors(model).items() if not bool(torch.isfinite(tensor).all())]


@contextmanager
def watch_outputs(models: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Yield a list that collects the modules with a non-finite output, in execution order.

    Args:
        models: Role -> model; modules are named ``role.path (Type)``.
    """
    found: list[str] = []
    handles = []

    def watcher(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, _inputs: Any, output: Any) -> None:
            if any(not bool(torch.isfinite(tensor).all()) for tensor in _floating(output)):
                found.append(f"{name} ({type(module).__name__})")

        return watch

    for role, model in models.items():
        for path, module in model.named_modules():
            handles.append(module.register_forward_hook(watcher(f"{role}.{path}" if path else role)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def diagnose(
    models: Mapping[str, nn.Module], rerun: Callable[[], tuple[Tensor, Mapping[str, Tensor]]]
) -> tuple[str, str, str]:
    """Run a batch again with hooks and report what is not finite.

    Args:
        models: Role -> model whose modules are watched; the first is the one being trained.
        rerun: Repeats the step's forward pass; returns the loss and its terms, with their graph.

    Returns:
        The term, the layer (both may be empty), and a text with everything that was found.
    """
    trained = next(iter(models.values()))
    with watch_outputs(models) as outputs:
        loss, terms = rerun()
    values = {name: float(value.detach()) for name, value in terms.items()}
    term = next((name for name, value in values.items() if not math.isfinite(value)), "")
    layer = outputs[0] if outputs else ""
    facts = [f"loss {float(loss.detach()):.6g}", *(f"term {name} {value:.6g}" for name, value in values.items())]
    if layer:
        facts.append(f"first non-finite output: {layer}")
    if not term and not layer:
        term, layer = _gradient_origin(trained, terms)
        if term:
            facts.append(f"non-finite gradient of term {term}, first at {layer}")
        else:
            term, layer = _weighted_origin(trained, loss, terms)
            facts.append(
                f"each term and its gradient are finite on their own, so the cause is a factor: the weight of "
                f"{term or 'a term'}, a loss scale or an earlier step; first at {layer or 'no single parameter'}"
            )
    weights = non_finite_weights(trained)
    if weights:
        facts.append(f"non-finite weights: {', '.join(weights[:3])}{', ...' if len(weights) > 3 else ''}")
    return term, layer, "; ".join(facts)


def _gradient_origin(model: nn.Module, terms: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the first term with a non-finite gradient, and the parameter nearest the output that gets one."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for term, value in terms.items():
        gradients = torch.autograd.grad(value, [p for _, p in named], retain_graph=True, allow_unused=True)
        broken = [
            name
            for (name, _), gradient in zip(named, gradients, strict=True)
            if gradient is not None and not bool(torch.isfinite(gradient).all())
        ]
        if broken:
            return term, broken[-1]  # the backward pass reaches the last one first
    return "", ""


def _weighted_origin(model: nn.Module, loss: Tensor, terms: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return the term with the largest factor in the loss, and the parameter nearest the output that overflows."""
    terms = {name: value for name, value in terms.items() if value.requires_grad}
    factors = torch.autograd.grad(loss, list(terms.values()), retain_graph=True, allow_unused=True)
    sizes = {name: float(factor.abs().nan_to_num(math.inf).max())
             for name, factor in zip(terms, factors, strict=True) if factor is not None}  # fmt: skip
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    broken = [name for (name, _), gradient in zip(named, gradients, strict=True)
              if gradient is not None and not bool(torch.isfinite(gradient).all())]  # fmt: skip
    return max(sizes, key=lambda name: sizes[name], default=""), broken[-1] if broken else ""


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _floating(value))
    elif isinstance(output, tuple | list):
        yield from (tensor for value in output for tensor in _floating(value))
