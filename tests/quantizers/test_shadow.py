"""A student in full precision: the float net it was made from, with gradients, and low-bit again behind the block."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qkd.testing import TinyNet
from quantizers import QuantSpec, Student, calibrate, freeze_batch_norm, prepare, unquantized

pytestmark = pytest.mark.usefixtures("eager")


def nets(**spec: object) -> tuple[nn.Module, Student, Tensor]:
    torch.manual_seed(0)
    net, images = TinyNet(), torch.randn(8, 1, 8, 8)
    net(images)  # statistics of its own
    student = prepare(net.eval(), QuantSpec(weight_bits=2, act_bits=2, **spec), images)  # type: ignore[arg-type]
    return net, student.eval(), images


@pytest.mark.parametrize("mode", ["eval", "frozen", "train"])
def test_it_is_the_float_net(mode: str) -> None:
    net, student, images = nets()
    if mode != "eval":
        student.train()
        freeze_batch_norm(student, mode == "frozen")
    if mode == "train":
        net.train()
    with unquantized(student):  # not calibrated yet: that settles scales, and weights by up to 0.2 % with them
        found = student(images)
    torch.testing.assert_close(found, net(images), atol=1e-5, rtol=1e-4)
    calibrate(student, images)
    assert (student(images) - found).abs().max() > 0.01, "behind the block it is low-bit again"


def test_modes_and_bits_come_back_also_on_failure() -> None:
    _, student, images = nets()
    calibrate(student, images)
    before, flags = student(images), [module.training for module in student.modules()]
    with pytest.raises(KeyError), unquantized(student), unquantized(student):
        raise KeyError
    assert [module.training for module in student.modules()] == flags
    assert torch.equal(student(images), before)


def test_its_state_stays_and_gradients_reach_the_images() -> None:
    _, student, images = nets()
    state = copy.deepcopy(student.state_dict())
    images.requires_grad_()
    with unquantized(student):
        student(images).square().sum().backward()
    assert images.grad is not None and bool(images.grad.isfinite().all()) and bool(images.grad.any())
    assert all(torch.equal(state[name], one) for name, one in student.state_dict().items())


def test_dorefa_keeps_its_bounded_weights() -> None:
    """What its grid rounds is not the weight but its bounded form, so that batch norm sees the same size."""
    _, student, _ = nets(weight_quantizer="dorefa")
    layer = next(module for name, module in student.named_modules() if name.endswith("left.0"))
    with unquantized(student):
        found = layer.low_bit_weight().detach()
    bounded = torch.tanh(layer.weight.detach())
    torch.testing.assert_close(found, bounded / bounded.abs().max())
    assert (found - layer.low_bit_weight()).abs().max() <= 1 / 3 + 1e-6  # half a step of 2 bits
