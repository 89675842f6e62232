"""Operands, modules and outputs that are used in unusual ways: twice, in two places, under names."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import quantizers
from export import ExportError, check_parity, cost_of_file, cost_of_student, export_onnx, write_view
from export.runtime import open_session
from quantizers import QuantSpec, RewriteError, calibrate, integer_view, prepare
from quantizers import integer as ir
from quantizers.graph.form.canonical import Affine, Permute

pytestmark = pytest.mark.usefixtures("eager")
SIZE = 6


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.act, self.relu, self.pool = nn.SiLU(), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.wide, self.head, self.aux = nn.Conv2d(16, 8, 1), nn.Linear(8, 5), nn.Linear(8, 3)

    def end(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(x), 1))


class SumTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.relu(self.a(x)))
        return self.end(self.relu(self.c(y + y)))


class Square(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.relu(self.a(x)))
        return self.end(self.relu(self.c(y * y)))


class CatTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.b(self.relu(self.a(x))))
        return self.end(self.relu(self.wide(torch.cat([y, y], 1))))


class OneActivation(Base):
    """The same SiLU, ReLU and drop-out objects in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.a(x)))
        y = self.drop(self.act(self.b(y)))
        return self.end(self.relu(self.c(self.relu(y))))


class SharedSlopes(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.act(self.c(self.act(self.b(self.relu(self.a(x)))))))


class TwoOutputs(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.flatten(self.pool(self.relu(self.b(self.relu(self.a(x))))), 1)
        return self.head(y), self.aux(y)


class Named(TwoOutputs):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        first, second = super().forward(x)
        return {"out": first, "aux": second}


NETS: dict[str, type[Base]] = {
    net.__name__: net for net in (SumTwice, Square, CatTwice, OneActivation, SharedSlopes, TwoOutputs, Named)
}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def make(net: type[nn.Module], bits: int = 4) -> Any:
    torch.manual_seed(3)
    student = prepare(net(), QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=images(2))
    calibrate(student, [images(16, 1)])
    return student.eval()


@pytest.mark.parametrize("flavor", ["ort", "qcdq", "qonnx"])
@pytest.mark.parametrize("name", [name for name in NETS if name != "Named"])
def test_every_code_is_the_student_s(name: str, flavor: str, tmp_path: Any) -> None:
    if flavor == "qonnx":
        pytest.importorskip("qonnx", reason="qonnx's executor is in the extra [qonnx], for Python 3.11 and newer")
    student = make(NETS[name])
    export_onnx(student, images(2), tmp_path / "n.onnx", flavor=flavor)
    report = check_parity(student, tmp_path / "n.onnx", [images(8, 2)])
    assert {layer.name for layer in report.layers} == set(quantizers.act_quantizers(student))
    assert not any(layer.differing for layer in report.layers) and report.off.max_difference < 1e-5
    assert cost_of_file(tmp_path / "n.onnx").student.macs == cost_of_student(student).student.macs


@pytest.mark.parametrize(("name", "kind"), [("SumTwice", ir.Add), ("Square", ir.Mul), ("CatTwice", ir.Concat)])
def test_an_operand_that_is_used_twice_stands_twice(name: str, kind: Any, tmp_path: Any) -> None:
    student = make(NETS[name])
    node = next(node for node in integer_view(student).nodes if isinstance(node, kind))
    assert len(node.inputs) == 2
    exported = export_onnx(student, images(2), tmp_path / "n.onnx")
    assert not exported.fall_backs or name == "CatTwice"
    operator = {"SumTwice": "QLinearAdd", "Square": "QLinearMul", "CatTwice": "Concat"}[name]
    assert exported.operators[operator] >= 1


def test_outputs_are_named_after_the_keys_of_a_dictionary(tmp_path: Any) -> None:
    student, batch = make(Named), images(4, 7)
    assert list(student(batch)) == ["out", "aux"]
    view = integer_view(student)
    assert view.output_names == ("out", "aux") and len(view.outputs) == 2
    for flavor in ("ort", "qcdq", "qonnx"):
        path = tmp_path / f"{flavor}.onnx"
        export_onnx(student, batch, path, flavor=flavor)
        assert [entry.name for entry in onnx.load(path).graph.output] == ["out", "aux"]
    with torch.no_grad():
        wanted = student(batch)
    for optimize in (False, True):
        session = open_session(tmp_path / "ort.onnx", optimize=optimize)
        for name, values in wanted.items():
            found = session.run([name], {"images": batch.numpy()})[0]
            np.testing.assert_allclose(found, values.numpy(), atol=1e-5)


def test_a_key_that_the_file_cannot_have_is_refused(residual: Any, tmp_path: Any) -> None:
    from dataclasses import replace

    view = replace(residual, output_names=("images",))
    with pytest.raises(ExportError, match=r"the outputs \['images'\] cannot be named so in the file"):
        write_view(view, [(1, 3, 15, 15)], tmp_path / "n.onnx")


def test_a_module_that_no_student_has_is_refused_by_name() -> None:
    student = make(SumTwice)
    for stranger in (nn.LayerNorm(8), nn.Softmax2d(), Affine(torch.ones(8), torch.zeros(8)), nn.Sequential()):
        changed = make(SumTwice)
        name = next(node.target for node in changed.graph.nodes if "relu" in str(node.target))
        parent, _, leaf = str(name).rpartition(".")
        changed.get_submodule(parent).add_module(leaf, stranger)
        with pytest.raises(RewriteError, match=rf"{name}: {type(stranger).__name__} has no form in the integer view"):
            integer_view(changed)
    assert integer_view(student)


def test_a_subclass_that_computes_something_else_is_refused() -> None:
    class Louder(nn.SiLU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    student = make(OneActivation)
    student.add_module("act", Louder())
    with pytest.raises(RewriteError, match="act: Louder has no form in the integer view"):
        integer_view(student)


def test_outputs_that_are_no_tensors_are_refused() -> None:
    student = make(TwoOutputs)
    output = next(node for node in student.graph.nodes if node.op == "output")
    output.args = ((output.args[0][0], None),)
    with pytest.raises(RewriteError, match="output 1 is None, not a tensor"):
        integer_view(student)
    assert isinstance(student, fx.GraphModule)


class Acting(Base):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.relu(self.c(self.act(self.b(self.relu(self.a(x)))))))


@pytest.mark.parametrize("flavor", ["ort", "qcdq", "qonnx"])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.Mish(), nn.GELU(approximate="tanh")], ids=lambda act: type(act).__name__)
def test_a_function_left_in_float_is_a_fall_back_and_strict_refuses_it(act: Any, flavor: str, tmp_path: Any) -> None:
    student = make(lambda: Acting(act))  # type: ignore[arg-type]
    exported = export_onnx(student, images(2), tmp_path / "n.onnx", flavor=flavor)
    name = type(act).__name__.lower()
    (sentence,) = exported.fall_backs
    assert sentence.startswith(f"act ({name}) ") and "in float" in sentence
    assert exported.fall_backs[0] in exported.warnings and exported.to_json()["fall_backs"] == exported.fall_backs
    with pytest.raises(ExportError, match=rf"layers stay in float:\n  act \({name}\)"):
        export_onnx(student, images(2), tmp_path / "s.onnx", flavor=flavor, strict=True)
    assert not (tmp_path / "s.onnx").exists()


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.LeakyReLU(0.1), nn.PReLU()], ids=lambda act: type(act).__name__)
def test_a_function_with_an_integer_kernel_is_none(act: Any, tmp_path: Any) -> None:
    exported = export_onnx(make(lambda: Acting(act)), images(2), tmp_path / "n.onnx", strict=True)  # type: ignore[arg-type]
    assert not exported.fall_backs


class Rows(nn.Module):
    """A linear layer on every pixel's channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.there = nn.Conv2d(3, 16, 1), nn.ReLU(), Permute((0, 2, 3, 1))
        self.rows, self.back, self.head = nn.Linear(16, 40), Permute((0, 3, 1, 2)), nn.Linear(40 * 36, 4)
        self.flat = nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        y = self.rows(self.there(self.relu(self.first(x))))
        return self.head(self.flat(self.relu(self.back(y))))


@pytest.mark.parametrize("form", ["gemm", "matmul_nbits"])
@pytest.mark.parametrize("count", [1, 5])
def test_a_linear_layer_on_four_axes_is_an_integer_kernel_for_any_batch(form: Any, count: int, tmp_path: Any) -> None:
    student = make(Rows)
    exported = export_onnx(student, images(2), tmp_path / "n.onnx", linear=form, strict=True)
    assert not exported.fall_backs
    report = check_parity(student, tmp_path / "n.onnx", [images(count, 4)])
    assert not any(layer.differing or layer.differing_on for layer in report.layers)
    ours, theirs = cost_of_student(student), cost_of_file(tmp_path / "n.onnx")
    assert ours.student.macs == theirs.student.macs == 36 * (3 * 16 + 16 * 40 + 40 * 4)
    assert ours.student.parameters == theirs.student.parameters
    rows = {row["name"]: row for row in quantizers.layer_report(student)}
    assert rows["rows"]["macs"] == 36 * 16 * 40
