"""Taps: they read real values by module path, and leave no trace."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from qkd.seeding import global_stream
from qkd.terms import Taps, dequantized
from qkd.terms.taps import PRE_QUANT
from qkd.testing import TinyNet
from quantizers import QuantSpec, calibrate, prepare
from quantizers.layers import ActQuantizer

pytestmark = pytest.mark.usefixtures("one_eager_thread")
X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_values_are_the_modules_outputs() -> None:
    net = TinyNet().eval()
    with Taps(net, ["stem", "left.0"]) as taps:
        net(X)
        values = taps.take()
        assert torch.equal(values["stem"], net.stem(X)) and torch.equal(values["left.0"], net.left[0](net.stem(X)))
        net(2 * X)
        assert torch.equal(taps.take()["stem"], net.stem(2 * X))
        assert hooks(net) == 2
    assert hooks(net) == 0


def test_hooks_go_when_the_block_fails() -> None:
    net = TinyNet()
    with pytest.raises(KeyError), Taps(net, ["stem"]):
        raise KeyError
    assert hooks(net) == 0


def test_gradients_flow_through_a_tap() -> None:
    net = TinyNet()
    with Taps(net, ["stem"]) as taps:
        net(X)
        taps.take()["stem"].sum().backward()
    assert net.stem[0].weight.grad is not None and net.head.weight.grad is None


@pytest.mark.parametrize(("path", "hint"), [("stm", "`stem`"), ("left.9", "`left.0`"), ("zzzz", "it has: "), ("", "")])
def test_an_unknown_path_gets_near_matches(path: str, hint: str) -> None:
    with pytest.raises(ValueError, match="the teacher has no module") as caught:
        Taps(TinyNet(), [path], role="teacher")
    assert hint in str(caught.value)


def test_a_module_that_did_not_run_is_named() -> None:
    net = TinyNet()
    with Taps(net, ["stem"]) as taps, pytest.raises(RuntimeError, match="did not run.*stem"):
        taps.take()


def test_quant_tensors_and_tuples_are_unwrapped() -> None:
    quant_tensor = namedtuple("IntQuantTensor", "value scale zero_point")
    inner = torch.ones(2)
    assert dequantized(inner) is inner
    assert dequantized(quant_tensor(inner, torch.tensor(0.1), torch.tensor(0))) is inner
    assert dequantized((inner, 3)) is inner
    with pytest.raises(TypeError, match="module a.b is a dict"):
        dequantized({}, "a.b")


def test_a_students_taps_are_on_its_grid() -> None:
    with global_stream(0, "init"):
        net = TinyNet().eval()
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), example_inputs=X)
    calibrate(student, [X])
    student.eval()
    with Taps(student, ["stem.2", "left.2"], translate=student.tap_paths, role="student") as taps:
        student(X)
        values = taps.take()
    with Taps(net, ["stem.2", "left.2"]) as float_taps:
        net(X)
        floats = float_taps.take()
    codes = {"left.2": 4, "stem.2": 256}  # 2 bits; 8 bits, since it is also an operand of the residual sum
    for path, value in values.items():
        assert type(value) is torch.Tensor and value.shape == floats[path].shape
        assert 2 <= len(value.unique()) <= codes[path]
        assert torch.corrcoef(torch.stack([value.flatten(), floats[path].flatten()]))[0, 1] > 0.6
    with pytest.raises(ValueError, match="the student has no module 'stem.7'.*did you mean"):
        Taps(student, ["stem.7"], translate=student.tap_paths, role="student")


def test_what_comes_before_the_grid() -> None:
    net = TinyNet()
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), example_inputs=X)
    calibrate(student, [X])
    paths = [path for path, inner in student.tap_paths.items()
             if isinstance(student.get_submodule(inner), ActQuantizer)]  # fmt: skip
    assert "relu" in paths and "stem" in paths
    with Taps(student, [*paths, *(path + PRE_QUANT for path in paths)], translate=student.tap_paths) as taps:
        student(X)
        values = taps.take()
    for path in paths:
        quantizer = student.get_submodule(student.tap_paths[path])
        before, after = values[path + PRE_QUANT], values[path]
        torch.testing.assert_close(quantizer(before), after)  # the rectified values round to what the net saw
        assert not torch.equal(before, after) and before.shape == after.shape
        assert quantizer.quant.kind != "unsigned" or float(before.detach().min()) >= 0
    values["relu" + PRE_QUANT].sum().backward()
    assert net is not student and student.get_submodule("stem.0").weight.grad is not None


def test_before_the_grid_of_a_float_net_is_its_output_and_of_what_rounds_nothing_an_error() -> None:
    net = TinyNet()
    with Taps(net, ["relu", "relu" + PRE_QUANT]) as taps:
        net(X)
        values = taps.take()
    assert torch.equal(values["relu"], values["relu" + PRE_QUANT])
    student = prepare(net, QuantSpec(weight_bits=2, act_bits=2), example_inputs=X)
    with pytest.raises(ValueError, match=r"'head' of the student does no rounding.*tap: pre_quant.*these have: .*relu"):
        Taps(student, ["head" + PRE_QUANT], translate=student.tap_paths, role="student")
