"""Five hundred small nets as people write them: each is the same function in low bits, or is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import beside
import pytest
import torch
from torch import nn

import quantizers
from export import export_onnx
from quantizers import RewriteError

HERE = Path(__file__).parent
checks, field_nets = beside.load(HERE / "field_checks.py"), beside.load(HERE / "field_nets")
MARKS = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad"),
    pytest.mark.filterwarnings("ignore:the network computes"),  # which no verdict is about
]
pytestmark = [*MARKS, pytest.mark.usefixtures("eager")]
FAST = [net for net in field_nets.NETS if net.is_fast]
SLOW = [net for net in field_nets.NETS if not net.is_fast]


def _snapshot(model: nn.Module) -> dict[str, Any]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"state": state, "modes": [module.training for module in model.modules()]}


def _check_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = _snapshot(model)
    assert after["modes"] == before["modes"], "prepare changed the float net's training flags"
    assert after["state"].keys() == before["state"].keys(), "prepare changed the float net's state"
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), f"prepare changed {name} of the float net"


def check_refusal(net: Any, error: RewriteError) -> None:
    """A refusal names the place, and says what to do."""
    message = str(error)
    assert re.search(net.says, message, re.IGNORECASE), f"{net.says!r} is not in: {message}"
    assert len(message) > 40 and "NoneType" not in message and "object has no attribute" not in message, message
    assert "report it" not in message, f"prepare met its own guard: {message}"
    if net.kind == "no integer form":  # images are not mixed there, so to say so would mislead
        assert "images of the batch" not in message, message
    verbs = "use|pass|replace|give|set|call|write|remove|fold|move|scale|do it|compute|take|put|train|return|work|add"
    advice = rf"\b({verbs})\b"
    assert re.search(advice, message, re.IGNORECASE), f"no way out in: {message}"


def check_exact(net: Any, folder: Path) -> None:
    """The student is the float net's function in float, near it in eight bits, and equal to its files in four."""
    torch.manual_seed(1)
    batches = [torch.randn(8, *net.shape) for _ in range(3)]
    x = torch.randn(3, *net.shape)
    model = net.build()
    before = _snapshot(model)
    student = quantizers.prepare(model, checks.EIGHT, example_inputs=batches[0][:2])
    _check_untouched(model, before)
    checks.check_frozen(student, model)  # before calibration, whose settling moves scales by up to 0.2 %
    checks.check_same_function(student, net.build(), x, drops=net.drops, in_training=net.same_in_training)
    trained = checks.with_statistics(net.build(), batches, drops=net.drops)
    student = checks.calibrated(trained, checks.EIGHT, batches)
    checks.check_close(student, trained, torch.cat(batches))
    student = checks.calibrated(trained, checks.FOUR, batches)
    checks.train_a_step(student, batches[0])
    for flavor in ("ort", "qcdq"):
        assert checks.check_file(student, x, folder / f"{flavor}.onnx", flavor)
    export_onnx(student, x[:1], folder / "qonnx.onnx", flavor="qonnx")


def check(net: Any, folder: Path) -> None:
    """Check one net."""
    if net.verdict == field_nets.EXACT:
        check_exact(net, folder)
        return
    with pytest.raises(RewriteError) as raised:
        quantizers.prepare(net.build(), checks.EIGHT, example_inputs=torch.randn(2, *net.shape))
    check_refusal(net, raised.value)


@pytest.mark.parametrize("net", FAST, ids=lambda net: net.id)
def test_net(net: Any, tmp_path: Path) -> None:
    check(net, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("net", SLOW, ids=lambda net: net.id)
def test_every_net(net: Any, tmp_path: Path) -> None:
    check(net, tmp_path)


def test_the_fast_tier_has_one_of_every_kind() -> None:
    assert len(FAST) <= 60 and len(field_nets.NETS) > 500
    assert {net.kind for net in field_nets.NETS} - {net.kind for net in FAST} <= {"frozen"}


def test_the_checks_see_a_vanished_rectifier() -> None:
    """A student whose unsigned grids became signed ones is another function, and the check says so."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(3, 3, 8, 8)
    student = quantizers.prepare(model, checks.EIGHT, example_inputs=x)
    for quantizer in quantizers.act_quantizers(student).values():
        quantizer.quant.kind = "signed"
    with pytest.raises(checks.Differs):
        checks.check_same_function(student, model, x, drops=False, in_training=True)
