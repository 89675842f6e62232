"""Clipping the gradient of distillation against that of the task, parameter by parameter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qkd.terms.combine import clip_to_norm, clipped_backward


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def same(loss: Tensor) -> Tensor:
    return loss


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.5), (1, 0.731058579), (2, 0.880797078), (3, 0.952574127)])
def test_by_hand(epoch: int, share: float) -> None:
    long, short = parameter(0.0, 0.0), parameter(0.0)
    task = 3 * long[0] + 4 * long[1] + 10 * short[0]  # norms 5 and 10
    distill = -100 * long[0] + 2 * short[0]  # norms 100 (clipped to 5 times the share) and 2 (left alone)
    clipped_backward(task, distill, same, [long, short], epoch=epoch)
    assert long.grad is not None and short.grad is not None
    assert long.grad.tolist() == pytest.approx([3 - 5 * share, 4])
    assert short.grad.tolist() == pytest.approx([12])


def test_a_shared_graph_gives_the_plain_sum_where_nothing_is_clipped() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3, 4)
    out = net(x)
    clipped_backward(out.square().sum(), 1e-3 * out.sum(), same, net.parameters(), epoch=0)
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    out = net(x)
    (out.square().sum() + 1e-3 * out.sum()).backward()
    for mine, plain in zip(found, net.parameters(), strict=True):
        torch.testing.assert_close(mine, plain.grad)


def test_other_parameters_take_the_plain_sum() -> None:
    own, other = parameter(1.0), parameter(2.0)
    clipped_backward(own[0] + other[0], 100 * own[0] * other[0], same, [own], epoch=0)
    assert own.grad is not None and other.grad is not None
    assert own.grad.tolist() == pytest.approx([1.5])
    assert other.grad.tolist() == pytest.approx([101.0])


def test_the_loss_scale_scales_all() -> None:
    plain, scaled = parameter(0.0, 0.0), parameter(0.0, 0.0)
    for one, factor in ((plain, 1.0), (scaled, 1024.0)):
        task, distill = one[0] + one[1], 50 * one[1]
        clipped_backward(task, distill, lambda loss, factor=factor: loss * factor, [one], epoch=2)
    assert plain.grad is not None and scaled.grad is not None
    torch.testing.assert_close(scaled.grad, plain.grad * 1024)


def test_without_a_task_gradient_there_is_none() -> None:
    missed, zero, frozen = parameter(1.0), parameter(1.0), nn.Parameter(torch.ones(1), requires_grad=False)
    clipped_backward(0 * zero[0], missed[0] + zero[0] + frozen[0], same, [missed, zero, frozen], epoch=0)
    assert missed.grad is None and frozen.grad is None
    assert zero.grad is not None and zero.grad.tolist() == [0.0]


def test_clipping_keeps_direction_and_what_is_short_zero_or_broken() -> None:
    gradient = torch.tensor([3.0, 4.0])
    assert clip_to_norm(gradient, torch.tensor(1.0)).tolist() == pytest.approx([0.6, 0.8])
    assert clip_to_norm(gradient, torch.tensor(5.0)).tolist() == [3.0, 4.0]
    assert clip_to_norm(gradient, torch.tensor(0.0)).tolist() == [0.0, 0.0]
    assert clip_to_norm(torch.zeros(2), torch.tensor(0.0)).tolist() == [0.0, 0.0]
    assert not math.isfinite(clip_to_norm(torch.tensor([math.inf, 1.0]), torch.tensor(1.0)).sum())
    assert not math.isfinite(clip_to_norm(torch.tensor([math.nan, 1.0]), torch.tensor(1.0)).sum())


def test_what_it_refuses() -> None:
    own = parameter(1.0)
    with pytest.raises(ValueError, match="epoch must not be negative, got epoch=-1"):
        clipped_backward(own[0], own[0], same, [own], epoch=-1)
    own.grad = torch.ones(1)
    with pytest.raises(ValueError, match="call zero_grad before"):
        clipped_backward(own[0], own[0], same, [own], epoch=0)
