"""What is folded into a layer trains as in the float net: closed channels stay closed, frozen offsets stay frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export import check_parity, export_onnx
from quantizers import QuantSpec, Student, calibrate, prepare, quant_layers

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OPEN = (torch.arange(6) < 3).float().view(1, 6, 1, 1)


class Net(nn.Module):
    """A convolution, something that closes half of its channels, and a head."""

    def __init__(self, close: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.close = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), close
        self.gain, self.offset = nn.Parameter(torch.full((6, 1, 1), 1.5)), nn.Parameter(torch.zeros(6, 1, 1))
        self.register_buffer("mask", OPEN.clone())
        self.next, self.head = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.next(self.close(self, x)).relu().mean((2, 3)))


def _steps(net: nn.Module, rate: float = 0.3) -> None:
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], rate)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(IMAGES), torch.arange(8) % 4).backward()
        optimizer.step()
    net.eval()


def _read_by(net: nn.Module, path: str) -> Tensor:
    """Return the largest magnitude of each channel that a layer reads."""
    seen: list[Tensor] = []
    handle = net.get_submodule(path).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    net(IMAGES)
    handle.remove()
    return seen[0].abs().amax((0, 2, 3))


def _student(net: nn.Module) -> Student:
    student = prepare(net, QuantSpec(8, 8), IMAGES)
    calibrate(student, IMAGES)
    return student


CLOSED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a mask": lambda m, x: m.conv(x) * m.mask,
    "a mask after batch norm": lambda m, x: m.norm(m.conv(x)) * m.mask,
    "a learned factor, then a mask": lambda m, x: m.conv(x) * m.gain * m.mask,
    "a mask, then a learned factor": lambda m, x: m.conv(x) * m.mask * m.gain,
    "a learned offset, then a mask": lambda m, x: (m.conv(x) + m.offset) * m.mask,
    "a mask, then ReLU": lambda m, x: torch.relu(m.norm(m.conv(x)) * m.mask),
}


@pytest.mark.parametrize("name", CLOSED)
def test_channels_that_a_constant_closes_stay_closed_in_training(name: str, tmp_path: Path) -> None:
    net = Net(CLOSED[name])
    student = _student(net)
    assert _read_by(student, "next")[:3].gt(0).all()
    _steps(student)
    _steps(net)
    assert not _read_by(net, "next")[3:].any()
    assert not _read_by(student, "next")[3:].any()
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx").path
    assert check_parity(student, path, IMAGES).passed


def test_an_output_that_is_multiplied_by_zero_stays_zero() -> None:
    student = _student(Net(lambda m, x: m.conv(x) * 0.0))
    _steps(student)
    assert not _read_by(student, "next").any()


def test_a_factor_of_frozen_zeros_in_batch_norm_stays_zero() -> None:
    net = Net(lambda m, x: m.norm(m.conv(x)) * m.gain)
    with torch.no_grad():
        net.norm.weight[3:] = 0
        net.norm.weight.requires_grad_(False)
        net.norm.bias.requires_grad_(False)
    student = _student(net)
    _steps(student)
    assert not _read_by(student, "next")[3:].any()


def test_other_constants_are_folded() -> None:
    scale = torch.tensor([2.0, -1.0, 0.5, 3.0, 1.0, 1.0]).view(6, 1, 1)
    student = _student(Net(lambda m, x: m.norm(m.conv(x) * scale) * scale + 1.0))
    assert set(quant_layers(student)) == {"conv", "next", "head"}


def test_a_mask_is_folded_into_a_layer_that_is_frozen() -> None:
    net = Net(CLOSED["a mask"])
    net.conv.requires_grad_(False)
    student = _student(net)
    assert set(quant_layers(student)) == {"conv", "next", "head"}
    assert not student.get_submodule("conv").weight[3:].any()


class Biased(nn.Module):
    """A convolution without a bias, and an offset."""

    def __init__(self, *, offset: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.head, self.offset = nn.Linear(6, 4), offset
        nn.init.normal_(self.norm.bias)
        self.norm.requires_grad_(False)

    def train(self, mode: bool = True) -> Biased:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x + 0.5 if self.offset else self.norm(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("offset", [False, True])
def test_a_frozen_offset_becomes_a_frozen_bias(offset: bool) -> None:
    layer: Any = quant_layers(_student(Biased(offset=offset)))["conv"]
    assert layer.bn is None and layer.bias.any()
    assert layer.weight.requires_grad and not layer.bias.requires_grad


def test_an_offset_that_a_learned_factor_moves_trains() -> None:
    net = Net(lambda m, x: m.norm(m.conv(x)) * m.gain)
    nn.init.ones_(net.norm.bias)
    net.norm.bias.requires_grad_(False)
    layer: Any = quant_layers(_student(net))["conv"]
    assert layer.bn.weight.requires_grad and layer.bn.bias.requires_grad
