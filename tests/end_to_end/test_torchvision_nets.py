"""Torchvision's nets, untrained: rewritten, calibrated, trained one step, exported, loaded, equal to the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import quantizers
from export import check_parity, export_onnx
from quantizers import QuantSpec

pytestmark = pytest.mark.usefixtures("eager")
CLASSES, IMAGES = 10, 4
FLOAT_OPERATORS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Sum", "AveragePool", "GlobalAveragePool")
# Grids of 8 bits have 255 ties; not every sum can be kept away from all of them.
DIFFERING_CODES = 1e-3

# SqueezeNet's logits are the mean of its last feature map: a real-valued output, so no grid stands behind that mean.
ENDS_IN_FLOAT = {"squeezenet1_1": {"GlobalAveragePool": 1}}
LARGE = ("alexnet", "vgg11_bn")  # half a gigabyte of float weights each: one specification

NETS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], int]] = {
    "resnet18": (torchvision.models.resnet18, {}, 64),
    "resnet50": (torchvision.models.resnet50, {}, 64),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, {}, 64),
    "vgg11_bn": (torchvision.models.vgg11_bn, {"init_weights": False}, 64),
    "alexnet": (torchvision.models.alexnet, {}, 96),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, {}, 64),
    "googlenet": (torchvision.models.googlenet, {"aux_logits": False, "init_weights": False}, 64),
}


def train_one_step(student: nn.Module, batch: Tensor) -> None:
    student.train()
    loss = F.cross_entropy(student(batch), torch.arange(len(batch)) % CLASSES)
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert bool(torch.isfinite(parameter.grad).all()), f"{name} gets a non-finite gradient"
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"), [(name, bits) for name in NETS for bits in ((2,) if name in LARGE else (2, 4))]
)
def test_net(name: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    build, options, size = NETS[name]
    model = build(weights=None, num_classes=CLASSES, **options)
    batches = [torch.randn(IMAGES, 3, size, size) for _ in range(2)]
    student = quantizers.prepare(model, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=batches[0][:1])
    quantizers.calibrate(student, batches)
    train_one_step(student, batches[0])
    quantizers.settle(student)

    exported = export_onnx(student, batches[0], tmp_path / "student.onnx", flavor="ort")
    operators = Counter(exported.operators)
    floating = {op: operators[op] for op in FLOAT_OPERATORS if operators[op]}
    assert floating == ENDS_IN_FLOAT.get(name, {}), operators
    assert operators["QLinearConv"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())

    report = check_parity(student, tmp_path / "student.onnx", batches)
    assert report.off.top1_agreement == 1.0
    assert not report.all_zero
    assert report.layers
    for layer in report.layers:
        assert layer.max_steps <= 1, layer
        assert layer.differing <= DIFFERING_CODES * layer.values, layer
