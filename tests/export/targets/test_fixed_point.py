"""The target hls4ml: only integers between quantizers, and multipliers that are rounded without changing a code."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from export import ExportError, check_parity, export_onnx
from export.targets.fixed_point import fraction_of
from quantizers import QuantSpec, Student, calibrate, prepare

pytestmark = pytest.mark.usefixtures("eager")


class Small(nn.Module):
    """A padded maximum, sum, concatenation, ReLU6, depthwise convolution, means, a square layer with zero bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act, self.side = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.deep, self.six = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6()
        self.top, self.pool, self.mean = nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3, bias=False))
        nn.init.zeros_(self.body[1].bias)
        nn.init.constant_(self.deep.bias, 5.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.top(self.act(self.stem(x)))
        x = self.pool(torch.cat([self.six(self.deep(x)), self.act(x + self.side(x))], 1))
        return self.body(self.mean(x))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(24, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def student_of(net: nn.Module, images: Tensor, **settings: int) -> Student:
    made = prepare(net.eval(), QuantSpec(symmetric=True, **settings), images[:2])
    calibrate(made, images)
    return made.eval()


@pytest.fixture(scope="module")
def student(eager: None, images: Tensor) -> Student:
    torch.manual_seed(0)
    return student_of(Small(), images)


@pytest.fixture(scope="module")
def model(student: Student, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return onnx.load(
        export_onnx(student, images[:2], tmp_path_factory.mktemp("model") / "a.onnx", target="hls4ml").path
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_file_is_the_student(images: Tensor, tmp_path: Path, bits: int) -> None:
    pytest.importorskip("qonnx", reason="qonnx's executor is in the extra [qonnx], for Python 3.11 and newer")
    torch.manual_seed(0)
    student = student_of(Small(), images, weight_bits=bits, act_bits=bits)
    path = export_onnx(student, images[:2], tmp_path / "student.onnx", target="hls4ml").path
    report = check_parity(student, path, [images[:4]])
    assert report.faults == () and report.constants > 20 and len(report.layers) >= 8


def test_a_changed_multiplier_is_a_difference(
    student: Student, model: onnx.ModelProto, images: Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("qonnx", reason="qonnx's executor is in the extra [qonnx], for Python 3.11 and newer")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    tensor = next(entry for entry in changed.graph.initializer if entry.name.endswith(".steps.factor.float"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.5), tensor.name))
    onnx.save(changed, tmp_path / "changed.onnx")
    faults = " ".join(check_parity(student, tmp_path / "changed.onnx", [images[:4]]).faults)
    assert "codes of" in faults and tensor.name in faults


def test_every_type_is_written_in_the_file(model: onnx.ModelProto) -> None:
    constants = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    assert not {node.op_type for node in model.graph.node} & {"Clip", "Gemm", "AveragePool", "GlobalAveragePool"}
    for node in model.graph.node:
        if node.op_type == "Quant":
            assert np.frexp(constants[node.input[1]].item())[0] == 0.5  # a power of two
            assert constants[node.input[2]].item() == 0 and constants[node.input[3]].item() >= 2
        typed = [name for name in node.input if name in constants and node.op_type in ("Conv", "MatMul", "Mul", "Add")]
        assert not typed, f"{node.name} reads {typed}, which has no type"
    shaped = {entry.name for entry in (*model.graph.value_info, *model.graph.output)}
    assert shaped >= {name for node in model.graph.node for name in node.output}


def test_padding_of_a_maximum_is_signed(model: onnx.ModelProto) -> None:
    """hls4ml 1.3 pads the maximum of an unsigned type with a large value."""
    makers = {name: node for node in model.graph.node for name in node.output}
    signed = {node.name: node.attribute for node in model.graph.node if node.op_type == "Quant"}
    (pool,) = [node for node in model.graph.node if node.op_type == "MaxPool"]
    assert next(entry.i for entry in signed[makers[pool.input[0]].name] if entry.name == "signed") == 1


def test_layers_multiply_integers(model: onnx.ModelProto) -> None:
    codes = [entry for entry in model.graph.initializer if entry.name.endswith(".codes")]
    assert len(codes) >= 9
    for entry in codes:
        values = numpy_helper.to_array(entry)
        assert np.array_equal(values, np.rint(values)) and np.abs(values).max() < 2**24


@pytest.mark.parametrize("seed", range(4))
def test_no_integer_changes_its_code_by_a_rounded_multiplier(seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high, reach = -8, 7, 3000
    factor = np.array([off_ties(rng, low, high, reach) for _ in range(3)])
    bits = fraction_of(factor, np.full(3, float(reach)), low, high)
    assert bits < 24  # which float32 could store, too
    for value in factor:
        rounded = Fraction(round(value * 2**bits), 2**bits)
        for integer in range(-reach, reach + 1):
            codes = [min(max(round(integer * step), low), high) for step in (Fraction(value), rounded)]
            assert codes[0] == codes[1], (value, bits, integer)


def off_ties(rng: np.random.Generator, low: int, high: int, reach: int) -> float:
    """Return a multiplier with which no integer is within 1/16 of a tie, as ``settle`` leaves them."""
    while True:
        value = float(rng.uniform(0.001, 0.02))
        ties = (np.arange(low, high) + 0.5) / value
        if np.abs(ties - np.rint(ties))[np.abs(ties) <= reach].min(initial=1) > 1 / 16:
            return value


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(3)], "Sigmoid has no fixed-point form"),
        ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(3, padding=1, count_include_pad=False), nn.Flatten(),
          nn.LazyLinear(3)], "a mean that excludes padding has no fixed-point form"),
        ([nn.Conv2d(2, 4, 3, dilation=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)], "0: hls4ml has no dilated"),
        ([nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)], "0: hls4ml cannot do 2 groups"),
        ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(3)],
         "pads both ends of a maximum alike, but this one has pads"),
        ([nn.Conv2d(2, 4, 3), nn.Hardtanh(-0.3, 0.7), nn.Flatten(), nn.LazyLinear(3)], "clamped to start at -0.3"),
        ([nn.Conv2d(2, 4, 8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)], "use nn.Flatten and nn.Linear"),
    ],
)  # fmt: skip
def test_what_has_no_such_form_is_refused(images: Tensor, tmp_path: Path, layers: list[nn.Module], words: str) -> None:
    net = nn.Sequential(*layers).eval()
    net(images[:2])
    with pytest.raises(ExportError, match=words):
        export_onnx(student_of(net, images), images[:2], tmp_path / "student.onnx", target="hls4ml")
    assert not list(tmp_path.iterdir())


def test_shifted_grids_are_refused(images: Tensor, tmp_path: Path) -> None:
    student = prepare(Small().eval(), QuantSpec(), images[:2])
    calibrate(student, images)
    with pytest.raises(ExportError, match="target 'hls4ml' takes no zero points; train with symmetric grids"):
        export_onnx(student.eval(), images[:2], tmp_path / "student.onnx", target="hls4ml")
