"""The layer that gives the logits is found by running the net: modules may be declared, and called, in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers
from qkd.methods.data_free.making.watching import Watched, last_layer_of
from qkd.terms.last_layer import LogitsWeights, logits_layer
from quantizers import QuantSpec

IMAGES = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


class WithAuxiliary(nn.Module):
    """A second head that is declared after the first one, and called after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.auxiliary = nn.BatchNorm2d(1), nn.Linear(16, 5), nn.Linear(16, 5)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm(x).flatten(1).relu()
        logits: Tensor = self.head(read)
        self.seen = self.auxiliary(2 * read)
        return logits


class Scaled(WithAuxiliary):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_head_that_is_declared_and_called_last_is_not_taken_for_it() -> None:
    """ZSKD took its weights, and DAFL and MSKD its input: those of another function."""
    net = WithAuxiliary()
    found = logits_layer(net, IMAGES)
    assert found is not None and found[0] == "head" and net.training
    assert torch.equal(LogitsWeights(net)(IMAGES), net.head.weight)
    assert LogitsWeights(net)(IMAGES).data_ptr() == net.head.weight.data_ptr(), "they follow a teacher that learns"
    assert last_layer_of(net, (1, 4, 4)) is net.head
    watched = Watched(net)
    images = IMAGES.clone().requires_grad_()
    seen = watched(images)
    assert seen.feature is not None and torch.equal(net.head(seen.feature), seen.logits)
    assert seen.feature.requires_grad and watched.last((1, 4, 4)) is net.head
    assert not net.head._forward_hooks and not net.auxiliary._forward_hooks


@pytest.mark.parametrize("net", [Scaled(), nn.Sequential(nn.Conv2d(1, 2, 4), nn.Flatten())])
def test_logits_of_no_linear_layer(net: nn.Module) -> None:
    assert logits_layer(net, IMAGES) is None and last_layer_of(net, (1, 4, 4)) is None
    with pytest.raises(ValueError, match=r"weights of the linear layer that gives the teacher's logits .*from none"):
        LogitsWeights(net)(IMAGES)
    with pytest.raises(ValueError, match="do not come from a linear layer"):
        Watched(net).last((1, 4, 4))


def test_a_layer_that_is_the_whole_net() -> None:
    net: Any = nn.Linear(4, 2)
    assert torch.equal(LogitsWeights(net)(torch.rand(2, 1, 4, 4)), net.weight)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_normed_weights_are_those_that_the_layer_computes_with(norm: Any) -> None:
    net = nn.Sequential(nn.Flatten(), norm(nn.Linear(16, 5))).eval()
    weights = LogitsWeights(net)
    assert torch.equal(weights(IMAGES), net[1].weight) and not weights(IMAGES).requires_grad
    with pytest.raises(ValueError, match=r"`1\.weight` is computed from other parameters"):
        weights.name(IMAGES)


def test_weights_of_a_low_bit_teacher_are_on_its_grid() -> None:
    """An auxiliary student teaches with its low-bit weights, not with the latent ones that it learned with."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    student = quantizers.prepare(net, QuantSpec(weight_bits=2, act_bits=2, first_bits=2, last_bits=2), IMAGES)
    quantizers.calibrate(student, [IMAGES])
    student.eval()
    weights = LogitsWeights(student)(IMAGES)
    assert len(weights[0].unique()) <= 4 and len(net[1].weight[0].unique()) == 16
