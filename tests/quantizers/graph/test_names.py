"""Names of a network's modules that mean something to torch.compile, to torch.fx or to a student's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export import check_parity, export_onnx
from quantizers import QuantSpec, Student, calibrate, prepare, quant_layers, unquantized

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _same_function(net: nn.Module) -> Student:
    student = prepare(net.eval(), QuantSpec(8, 8), IMAGES)
    calibrate(student, IMAGES, keep_statistics=True)
    with unquantized(student.eval()):
        torch.testing.assert_close(student(IMAGES), net(IMAGES), rtol=0.02, atol=0.02)
    return student


class Scaled(nn.Module):
    """A network that keeps its layers in a child, and does something itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self._modules[self.name](x * 2.0) + 1.0  # type: ignore[misc]


@pytest.mark.parametrize("name", ["_orig_mod", "module", "_fsdp_wrapped_module"])
def test_only_wrappers_of_torch_are_taken_off(name: str) -> None:
    _same_function(Scaled(name))
    _same_function(nn.Sequential(Scaled(name)))


def test_what_torch_compile_made_is_taken_off() -> None:
    net: Any = torch.compile(Scaled("inner"))
    assert list(quant_layers(prepare(nn.Sequential(net), QuantSpec(), IMAGES))) == ["0.mul", "0.inner.0", "0.inner.2"]


@pytest.mark.parametrize("name", ["self", "Self", "_self"])
def test_a_module_called_self(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.add_module(name, nn.Conv2d(3, 4, 3))
            self.last = nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self._modules[name](x).relu())  # type: ignore[misc]

    student = _same_function(Net())
    assert f"{name}.weight" in student.state_dict()


class Within(nn.Conv2d):
    """A convolution with something of its own before it, under a name that the student's layer needs."""

    def __init__(self, name: str, child: nn.Module, channels: int) -> None:
        super().__init__(channels, 4, 3)
        self.name_of_child = name
        self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._modules[self.name_of_child](x))  # type: ignore[misc]


NAMES = ("bn", "mask", "quant", "source", "connect", "folded", "name", "weight_quant", "deployed_in_training")
CHILDREN = {
    "a batch norm": lambda: nn.BatchNorm2d(3), "a convolution": lambda: nn.Conv2d(3, 3, 1),
    "several": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)),
}  # fmt: skip


@pytest.mark.parametrize("child", CHILDREN)
@pytest.mark.parametrize("name", NAMES)
def test_children_named_like_attributes_of_a_layer(name: str, child: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Within(name, CHILDREN[child](), 3), nn.ReLU()), nn.Conv2d(4, 2, 3))
    student = _same_function(net)
    places = {path: place for path, place in student.tap_paths.items() if path.startswith(f"0.0.{name}")}
    assert places and all(place.startswith(f"0.0.{name}_") for place in places.values())
    assert all(student.get_submodule(place) is not None for place in student.tap_paths.values())
    again = prepare(net, QuantSpec(8, 8), IMAGES)
    again.load_state_dict(student.state_dict())
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx").path
    assert check_parity(again, path, IMAGES).passed


def test_other_children_keep_their_names() -> None:
    net = nn.Sequential(Within("before", nn.BatchNorm2d(3), 3))
    net.add_module("bn", nn.Conv2d(4, 2, 3))
    assert {"0", "0.before", "bn"} <= set(quant_layers(prepare(net, QuantSpec(), IMAGES)))
