"""A student temporarily in other arithmetic: in full precision, or with batch norm on a batch's own statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers.modes import evaluating, statistics_kept, training_flags_kept
from quantizers.student import act_quantizers, quant_layers
from quantizers.tensor_quant import ActQuant, WeightQuant


@contextmanager
def unquantized(student: nn.Module) -> Iterator[None]:
    """Make a student compute in full precision within a block; its quantizers are back on after it, even on failure.

    It is the float net whose weights the student rounds. Batch norm uses the batch or its running statistics, as it
    does outside the block: the latter in eval mode and after :func:`freeze_batch_norm`. Biases are not rounded either.

    Args:
        student: A network from :func:`prepare`, calibrated or not.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> from quantizers import QuantSpec, prepare
        >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(4, 1, 8, 8)
        >>> student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), images)
        >>> with unquantized(student):
        ...     bool(torch.allclose(student(images), net(images), atol=1e-6))
        True
    """
    layers = list(quant_layers(student).values())
    quants: list[WeightQuant | ActQuant] = [
        *(layer.quant for layer in layers),
        *(one.quant for one in act_quantizers(student).values()),
    ]
    before = [quant.bypass for quant in quants]
    with training_flags_kept(student):
        for layer in layers:  # the deployed arithmetic folds batch norm into the grids of weights and biases
            is_deployed = layer.uses_deployed
            layer.training = True
            if layer.bn is not None:
                layer.bn.training = not is_deployed
        were = [layer.deployed_in_training for layer in layers]
        try:
            for layer in layers:
                layer.deployed_in_training = False
            for quant in quants:
                quant.bypass = True
            yield
        finally:
            for layer, was in zip(layers, were, strict=True):
                layer.deployed_in_training = was
            for quant, was in zip(quants, before, strict=True):
                quant.bypass = was


@contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Make batch norm use each batch's own statistics within a block, with nothing else in training mode.

    Running statistics do not change. In a student, layers with batch norm leave the deployed arithmetic: batch norm is
    not folded, and biases are not rounded.

    Args:
        net: Float, or from :func:`prepare`; its modes are restored after the block.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> net = nn.BatchNorm1d(1).eval()
        >>> with batch_statistics(net):
        ...     net(torch.tensor([[3.0], [5.0]])).flatten().round().tolist()
        [-1.0, 1.0]
        >>> net.running_mean.item()
        0.0
    """
    layers = [layer for layer in quant_layers(net).values() if layer.bn is not None]
    deployed = [layer.deployed_in_training for layer in layers]
    with evaluating(net), statistics_kept(net):
        try:
            for layer in layers:
                layer.training, layer.deployed_in_training = True, False
            for module in net.modules():
                if isinstance(module, _BatchNorm):
                    module.training = True
            yield
        finally:
            for layer, was in zip(layers, deployed, strict=True):
                layer.deployed_in_training = was
