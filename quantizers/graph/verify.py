"""Checks, before training, that a student with all quantizers bypassed computes the same as the float network.

Every value of the student that corresponds to a value of the float network is computed, without any rounding to a
grid, from the float network's own values, and compared: in eval mode, where batch norm is folded into the weights as
in deployment, and in training mode, where it uses the statistics of the batch. Drop-out is the identity in both; its
positions need no check, as they were recorded. Since each step starts from exact values, errors do not accumulate, and
the tolerance can be that of one step.

Tolerance: ``STEP_TOLERANCE`` of the largest value of a tensor. A step is at most a convolution with batch norm.
Folding turns ``((w x) - mean) * factor + beta`` into ``(w factor) x + (beta - mean * factor)``, which in exact
arithmetic is the same. In float32 both round each product and sum once, to a relative ``2**-24`` of the terms, and
sums of ``n`` products increase that by about ``sqrt(n)``, which is 2e-5 for the 100,000 products of the largest
layers. A missing ReLU or an extra branch is larger by orders of magnitude. The network's own output is compared end to
end, where the errors of all steps accumulate: ``OUTPUT_TOLERANCE``.

Residual branches often start at a factor of zero, where anything would agree. So in training mode, batch norm's factors
are perturbed at random (identically on both sides) before the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from quantizers.graph.form.kinds import PASS, is_pass
from quantizers.graph.recording.copying import example_images
from quantizers.graph.recording.returned import tensors
from quantizers.graph.recording.steps import STEP_TOLERANCE
from quantizers.graph.trace import EVAL_IMAGES, MOVED_BY, TRAIN_IMAGES, RewriteError, Traced
from quantizers.layers import ActQuantizer, QuantConvBn2d, QuantLinearBn
from quantizers.modes import exact_float32

OUTPUT_TOLERANCE = 1e-3

Pairs = Sequence[tuple[fx.Node, str]]
Norm = Callable[[_BatchNorm, Tensor], Tensor]


def verify_student(traced: Traced, student: nn.Module, pairs: Pairs, example_inputs: Tensor) -> None:
    """Compare a student with the float network it was created from; neither is changed.

    Args:
        traced: The float network.
        student: Its student; need not be calibrated.
        pairs: A node of the network and the name of the student's node that must have its value.
        example_inputs: Images as the network takes them.

    Raises:
        RewriteError: If they differ by more than float rounding (names the first node that differs).
    """
    device = next((p.device for module in traced.modules.values() for p in module.parameters()), torch.device("cpu"))
    student.eval()
    with torch.no_grad(), exact_float32():
        values = _float_values(traced, example_images(example_inputs, EVAL_IMAGES, device), _running)
        _compare_outputs(traced, values)
        _compare(traced, student, pairs, values, _running)
        of_batch = _BatchStatistics(traced, student)
        values = _float_values(traced, example_images(example_inputs, TRAIN_IMAGES, device), of_batch)
        _compare(traced, student, pairs, values, of_batch)


# -- batch norm, without touching its running statistics ---------------------------------------------------------------


def _running(norm: _BatchNorm, x: Tensor) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)


class _BatchStatistics:
    """Batch norm as in training, with factors perturbed so that none is zero.

    Args:
        traced: The float network.
        student: Its student; only factors that both hold are perturbed (folding another factor in makes a copy).
    """

    def __init__(self, traced: Traced, student: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        own = {id(module.weight) for module in student.modules() if isinstance(module, _BatchNorm)}
        self._factors: dict[int, Tensor] = {}
        for module in traced.modules.values():
            if isinstance(module, _BatchNorm) and module.weight is not None and id(module.weight) in own:
                noise = torch.randn(module.weight.shape, generator=generator).to(module.weight)
                self._factors[id(module.weight)] = module.weight + MOVED_BY * noise

    def __call__(self, norm: _BatchNorm, x: Tensor) -> Tensor:
        weight = self._factors.get(id(norm.weight), norm.weight)
        return F.batch_norm(x, None, None, weight, norm.bias, training=True, eps=norm.eps)


# -- running both ------------------------------------------------------------------------------------------------------


def _float_values(traced: Traced, images: Tensor, normalize: Norm) -> dict[fx.Node, Tensor]:
    values: dict[fx.Node, Tensor] = {}
    for node in traced.graph.nodes:
        module = traced.module(node)
        if node.op == "placeholder":
            values[node] = images
        elif module is not None:
            operands = [values[operand] for operand in node.args]
            if node.meta["kind"] == PASS:
                values[node] = operands[0]
            elif isinstance(module, _BatchNorm):
                values[node] = normalize(module, operands[0])
            else:
                values[node] = module.eval()(*operands)
    return values


def _compare(
    traced: Traced, student: nn.Module, pairs: Pairs, expected: dict[fx.Node, Tensor], normalize: Norm
) -> None:
    partners: dict[str, list[fx.Node]] = {}
    for float_node, name in pairs:
        partners.setdefault(name, []).append(float_node)
    images = next(value for node, value in expected.items() if node.op == "placeholder")
    modules, values = dict(student.named_modules(remove_duplicate=False)), dict[fx.Node, Tensor]()
    for node in student.graph.nodes:  # type: ignore[union-attr]
        if node.op == "output":
            continue
        if node.op == "placeholder":
            values[node] = images
            continue
        values[node] = _bypassed(modules[str(node.target)], [values[o] for o in node.args], normalize)
        for float_node in partners.get(node.name, []):
            _check(traced, float_node, expected[float_node], values[node])
        if node.name in partners:
            values[node] = expected[partners[node.name][0]]


def _bypassed(module: nn.Module, operands: list[Tensor], normalize: Norm) -> Tensor:
    """Return the output of a student's module without rounding to grids."""
    if isinstance(module, ActQuantizer):
        return module.quant.in_float(operands[0])
    if isinstance(module, (QuantConvBn2d, QuantLinearBn)):
        return _layer(module, operands[0], normalize)
    return operands[0] if is_pass(module) else module(*operands)


def _layer(layer: Any, x: Tensor, normalize: Norm) -> Tensor:
    weight = layer.weight if layer.mask is None else layer.weight * layer.mask
    if layer.bn is not None and normalize is _running:
        factor, shift = layer._affine()
        weight = weight if factor is None else weight * factor.reshape(-1, *(1,) * (weight.dim() - 1))
        return _linear(layer, x, weight, shift)
    out = _linear(layer, x, weight, layer.bias)
    return out if layer.bn is None else normalize(layer.bn, out)


def _linear(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, QuantLinearBn):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)  # type: ignore[no-any-return]


# -- comparing ---------------------------------------------------------------------------------------------------------


def _check(traced: Traced, node: fx.Node, expected: Tensor, got: Tensor) -> None:
    if got.shape != expected.shape:
        raise RewriteError(_message(traced, node, f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"))
    if not torch.equal(torch.isfinite(got), torch.isfinite(expected)):
        raise RewriteError(_message(traced, node, "NaN or infinity on one side"))
    error = _largest(got - expected)
    bound = STEP_TOLERANCE * _largest(expected)
    if error > bound and error > torch.finfo(torch.float32).eps:
        raise RewriteError(_message(traced, node, f"values up to {_largest(expected):.3g} differ by {error:.3g}"))


def _largest(x: Tensor) -> float:
    """Return the largest magnitude of the finite values; :func:`_check` handles the others."""
    finite = torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    return float(finite.abs().max()) if x.numel() else 0.0


def _message(traced: Traced, node: fx.Node, found: str) -> str:
    site = f" ({node.meta['site']})" if node.meta.get("site") else ""
    return (
        f"{traced.path(node)}{site}: from here on the student would be another function than the float network "
        f"({found}). Please report it; prepare(..., verify=False) skips this check"
    )


def _compare_outputs(traced: Traced, values: dict[fx.Node, Tensor]) -> None:
    end = next(node for node in traced.graph.nodes if node.op == "output")
    nodes = [leaf for leaf in pytree.tree_leaves(end.args[0]) if isinstance(leaf, fx.Node)]
    results = tensors(traced.result)
    for node, expected in zip(nodes, results, strict=True):
        error = _largest(values[node] - expected)
        if not torch.equal(torch.isfinite(values[node]), torch.isfinite(expected)):
            raise RewriteError(_message(traced, node, "NaN or infinity on one side"))
        if error > OUTPUT_TOLERANCE * max(_largest(expected), 1e-6):
            raise RewriteError(
                _message(traced, node, f"an output up to {_largest(expected):.3g} differs by {error:.3g}")
            )
