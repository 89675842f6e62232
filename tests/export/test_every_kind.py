"""Every kind of module that `prepare` takes is one that every flavor writes: driven from the tables themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import export.graph.shapes
import export.lowering.model
import quantizers
from export import check_parity, cost_of_file, cost_of_student, export_onnx
from export.lowering import FUNCTION_WRITERS, MOVE_WRITERS
from quantizers import QuantSpec, act_quantizers, calibrate, integer_view, prepare
from quantizers.functions import FUNCTIONS
from quantizers.graph.form.canonical import Affine, Expand, Gather, Move, Pad, Permute, Reshape, Slice
from quantizers.integer import Node
from quantizers.layers import Concat, GlobalAveragePool, Product, Sum
from quantizers.view import VIEWERS

pytestmark = pytest.mark.usefixtures("eager")
SIZE = 6
FLAVORS = ("ort", "qcdq", "qonnx")


class Flat(nn.Module):
    """A module of rows of features behind the mean."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.pool, self.flat, self.modules_ = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.modules_(self.flat(self.pool(x)))


class Around(nn.Module):
    """A stem of eight channels, the module that is tried, and layers behind it that fit what it gives."""

    def __init__(self, tried: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.tried = tried
        shape = tried.eval()(torch.zeros(2, 8, SIZE, SIZE)).shape
        is_image = len(shape) == 4
        self.next = nn.Conv2d(shape[1], 6, 1) if is_image else nn.Linear(shape[-1], 6)
        self.last_act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1) if is_image else nn.Identity()
        self.flat = nn.Flatten()
        rows = 6 if is_image else 6 * (shape[1] if len(shape) == 3 else 1)
        self.head = nn.Linear(rows, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tried(self.act(self.norm(self.stem(x))))
        return self.head(self.flat(self.pool(self.last_act(self.next(y)))))


class Signed(nn.Module):
    """A function behind a convolution, so that it meets both signs."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(8, 8, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


def signed(function: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Around(Signed(function))


def around(*modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: Around(modules[0] if len(modules) == 1 else nn.Sequential(*modules))


def slopes() -> nn.PReLU:
    prelu = nn.PReLU(8)
    with torch.no_grad():
        prelu.weight.copy_(torch.linspace(-0.5, 1.5, 8))
    return prelu


# One net at least for every type in the table of kinds. A type without one fails below.
NETS: dict[type[nn.Module], list[Callable[[], nn.Module]]] = {
    nn.Conv2d: [around(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2))],
    nn.Linear: [
        around(Flat(nn.Linear(8, 7))),
        around(Permute((0, 2, 3, 1)), nn.Linear(8, 7), nn.ReLU(), Permute((0, 3, 1, 2))),
        around(Reshape((8, 36)), nn.Linear(36, 7)),
    ],
    nn.BatchNorm2d: [around(nn.BatchNorm2d(8), nn.ReLU())],
    nn.BatchNorm1d: [around(Flat(nn.Linear(8, 7), nn.BatchNorm1d(7), nn.ReLU()))],
    nn.ReLU: [around(nn.Conv2d(8, 8, 1), nn.ReLU())],
    nn.ReLU6: [around(nn.Conv2d(8, 8, 1), nn.ReLU6())],
    nn.MaxPool2d: [around(nn.MaxPool2d(3, 2, 1, ceil_mode=True))],
    nn.AvgPool2d: [around(nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False))],
    nn.AdaptiveAvgPool2d: [around(nn.AdaptiveAvgPool2d((4, 3)))],
    nn.Identity: [around(nn.Identity())],
    nn.Dropout: [around(nn.Dropout(0.5))],
    nn.Dropout1d: [around(nn.Flatten(2), nn.Dropout1d(0.5), Reshape((8, 6, 6)))],
    nn.Dropout2d: [around(nn.Dropout2d(0.5))],
    nn.Dropout3d: [around(Reshape((8, 1, 6, 6)), nn.Dropout3d(0.5), Reshape((8, 6, 6)))],
    nn.AlphaDropout: [around(nn.AlphaDropout(0.5))],
    nn.FeatureAlphaDropout: [around(nn.FeatureAlphaDropout(0.5))],
    nn.Flatten: [around(nn.Flatten()), around(nn.Flatten(2))],
    nn.Softmax: [lambda: nn.Sequential(Around(nn.Identity()), nn.Softmax(dim=1))],
    nn.LogSoftmax: [lambda: nn.Sequential(Around(nn.Identity()), nn.LogSoftmax(dim=-1))],
    Reshape: [around(Reshape((2, 4, 36)), Permute((0, 2, 1, 3)), Reshape((8, 6, 6)))],
    Permute: [around(Permute((0, 1, 3, 2)))],
    Slice: [around(Slice(1, 1, 8, 3)), around(Slice(3, 0, 5, 2))],
    Gather: [around(Gather(1, [7, 0, 3])), around(Gather(2, [0, 0, 1, 1, 5]))],
    Pad: [
        around(Pad((0, 0, 1, 0), (0, 0, 0, 2))),
        around(Pad((0, 3, 0, 0), (0, 1, 0, 0))),
        lambda: Around(Signed(nn.Sequential(nn.SiLU(), Pad((0, 1, 1, 1), (0, 0, 1, 1))))),  # a shifted grid
        lambda: Around(Signed(Pad((0, 0, 1, 1), (0, 0, 1, 1)))),  # a signed one
    ],
    Expand: [around(nn.AdaptiveAvgPool2d(1), Expand((8, 3, 3)))],
    nn.CELU: [signed(nn.CELU(0.7))],
    nn.ELU: [signed(nn.ELU(0.7))],
    nn.GELU: [signed(nn.GELU()), signed(nn.GELU(approximate="tanh"))],
    nn.Hardshrink: [signed(nn.Hardshrink(0.2))],
    nn.Hardsigmoid: [signed(nn.Hardsigmoid())],
    nn.Hardswish: [signed(nn.Hardswish())],
    nn.Hardtanh: [signed(nn.Hardtanh(-0.5, 0.8)), signed(nn.Hardtanh(-0.5, float("inf"))), signed(nn.Hardtanh(0, 2))],
    nn.LeakyReLU: [signed(nn.LeakyReLU(0.2))],
    nn.LogSigmoid: [signed(nn.LogSigmoid())],
    nn.Mish: [signed(nn.Mish())],
    nn.PReLU: [signed(nn.PReLU()), signed(slopes()), around(Flat(nn.Linear(8, 8), slopes()))],
    nn.SELU: [signed(nn.SELU())],
    nn.SiLU: [signed(nn.SiLU())],
    nn.Sigmoid: [signed(nn.Sigmoid())],
    nn.Softplus: [signed(nn.Softplus()), signed(nn.Softplus(beta=2.0, threshold=1.0))],
    nn.Softshrink: [signed(nn.Softshrink(0.2))],
    nn.Softsign: [signed(nn.Softsign())],
    nn.Tanh: [signed(nn.Tanh())],
    nn.Tanhshrink: [signed(nn.Tanhshrink())],
    nn.Threshold: [signed(nn.Threshold(0.1, -0.2))],
}
JOINTS = {Sum, Product, Concat, GlobalAveragePool}  # tried in test_uses.py, and by the means above


def kinds_that_prepare_takes() -> set[type[nn.Module]]:
    """Return the front end's own table of modules, wherever it keeps it."""
    from quantizers.graph.form import kinds

    moves = set(Move.__subclasses__())
    return {*kinds._KINDS, *kinds.FUNCTION_NAMES, *kinds.DROPOUTS, *moves} - {Affine}  # which is gone before the view


TAKEN = kinds_that_prepare_takes()
CASES = [
    pytest.param(kind, number, id=f"{kind.__name__}-{number}")
    for kind in NETS if kind in TAKEN
    for number in range(len(NETS[kind]))
]  # fmt: skip


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


_students: dict[Any, Any] = {}


def drawn(net: nn.Module) -> nn.Module:
    """Return the net in training mode with seeded weights: modules in the table are older than the seed."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.2, 0.2)
    return net.train()


def student_of(kind: type[nn.Module], number: int) -> Any:
    if (kind, number) not in _students:
        torch.manual_seed(number)
        spec = QuantSpec(weight_bits=3, act_bits=3)
        student = prepare(drawn(NETS[kind][number]()), spec, example_inputs=images(2))
        calibrate(student, [images(16, 1)])
        _students[kind, number] = student.eval()
    return _students[kind, number]


def test_the_tables_agree() -> None:
    assert set(NETS) | JOINTS >= TAKEN, "a kind that prepare takes has no net here"
    assert {function.name for function in FUNCTIONS.values()} <= set(FUNCTION_WRITERS)
    assert set(MOVE_WRITERS) == set(export.graph.shapes.MOVES)
    assert set(export.lowering.model.WRITERS) == set(export.graph.shapes.RULES) == set(Node.__subclasses__())
    assert set(FUNCTIONS) <= set(VIEWERS) and TAKEN - JOINTS and len(CASES) > 50


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize(("kind", "number"), CASES)
def test_every_flavor_writes_it(kind: type[nn.Module], number: int, flavor: str, tmp_path: Any) -> None:
    if flavor == "qonnx":
        pytest.importorskip("qonnx", reason="qonnx's executor is in the extra [qonnx], for Python 3.11 and newer")
    student = student_of(kind, number)
    path = tmp_path / "n.onnx"
    exported = export_onnx(student, images(2), path, flavor=flavor)
    report = check_parity(student, path, [images(6, 2)])
    compared = {layer.name: layer.differing for layer in report.layers}
    quantized = {name for name, _ in quantizers.act_quantizers(student).items()}
    assert set(compared) == quantized and not any(compared.values())
    assert report.off.max_difference < 1e-5
    assert float(student(images(6, 2)).detach().std(0).max()) > 1e-3, "images must matter"
    assert all(layer.max_steps_on <= 1 for layer in report.layers)
    assert cost_of_file(path).student.macs == cost_of_student(student).student.macs
    assert exported.layers


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_every_parameter_learns(kind: type[nn.Module], number: int) -> None:
    student = student_of(kind, number)
    student.train()
    try:
        student.zero_grad()
        output = student(images(8, 3))
        (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        learned = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
        assert learned and not [name for name, parameter in learned.items() if parameter.grad is None]
        assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)
    finally:
        student.eval()
        student.zero_grad()


def test_slopes_of_a_prelu_are_in_the_file_a_channel_each(tmp_path: Any) -> None:
    import onnx
    from onnx import numpy_helper

    student = student_of(nn.PReLU, 1)
    export_onnx(student, images(2), tmp_path / "n.onnx")
    model = onnx.load(tmp_path / "n.onnx")
    (node,) = [node for node in model.graph.node if node.op_type == "PRelu"]
    stored = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}[node.input[1]]
    assert stored.shape == (8, 1, 1) and stored.flatten().tolist() == student.tried.function.weight.tolist()
    single = export_onnx(student_of(nn.PReLU, 0), images(2), tmp_path / "s.onnx")
    assert single.operators["QLinearLeakyRelu"] == 1


@pytest.mark.parametrize(("kind", "function"), [(nn.Softmax, torch.softmax), (nn.LogSoftmax, torch.log_softmax)])
def test_a_final_softmax_is_in_the_file_and_losses_get_logits(kind: Any, function: Any, tmp_path: Any) -> None:
    student = student_of(kind, 0)
    batch = images(4, 5)
    quantizers.freeze_batch_norm(student)  # so that both modes compute one arithmetic
    with torch.no_grad():
        given, logits = student(batch), student.train()(batch)
    student.eval()
    quantizers.freeze_batch_norm(student, False)
    torch.testing.assert_close(given, function(logits, 1))
    assert not torch.allclose(given, logits)
    exported = export_onnx(student, batch, tmp_path / "n.onnx", strict=True)
    assert exported.operators[kind.__name__] == 1 and integer_view(student).nodes[-1].op in ("softmax", "log_softmax")


class Canceling(nn.Module):
    """Values that cancel: their mean is 0 but for the order of the sum, and so is what multiplies it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.head((y - y.flip(3)).mean((2, 3)))


@pytest.mark.parametrize("flavor", ["ort", "qcdq"])
@pytest.mark.parametrize("bits", [2, 8])
def test_values_that_cancel_leave_no_grid_that_a_runtime_refuses(flavor: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 6, 6) for _ in range(2)]
    student = prepare(Canceling(), QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=batches[0])
    calibrate(student, batches)
    for quantizer in act_quantizers(student).values():
        if quantizer.origin is not None and quantizer.origin.kind == "mean":
            unit = float(quantizer.origin.sources[0].quant.step.detach()) / 36
            assert unit / float(quantizer.quant.step.detach()) < 1.01 * 2.0 ** (quantizer.quant.bits - 1)
    export_onnx(student, batches[0], tmp_path / "s.onnx", flavor=flavor)
    assert check_parity(student.eval(), tmp_path / "s.onnx", batches).passed
