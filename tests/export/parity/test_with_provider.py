"""A file under an execution provider is compared bit for bit, whole and layer by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export import ParityError, check_parity, export_onnx, lowbit
from export.parity.with_provider import ProviderTally, ending_at
from export.runtime import load_model
from quantizers import QuantSpec, calibrate, prepare, settle

pytestmark = pytest.mark.usefixtures("eager")


class Net(nn.Module):
    """A block with a skip path, wide enough for the low-bit provider."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.left = nn.Conv2d(width, width, 3, padding=1)
        self.right = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.right(torch.relu(self.left(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(24, 3, 9, 9, generator=torch.Generator().manual_seed(3))


def made(images: torch.Tensor, path: Path, flavor: str = "ort", **spec: int) -> nn.Module:
    torch.manual_seed(0)
    student = prepare(Net(), QuantSpec(**{"weight_bits": 2, "act_bits": 2, **spec}), example_inputs=images)
    calibrate(student, [images])
    settle(student)
    export_onnx(student.eval(), images, path, flavor=flavor)
    return student


@pytest.fixture
def offered() -> str:
    try:
        return lowbit.register()
    except lowbit.LowBitUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("flavor", ["ort", "qcdq"])
def test_every_layer_that_it_takes_is_computed_in_a_graph_that_ends_there(flavor, images, tmp_path, offered):
    path = tmp_path / "s.onnx"
    student = made(images, path, flavor)
    report = check_parity(student, path, [images[:10], images[10:]], layer_images=12, provider=offered)
    found = report.provider
    assert report.passed and found is not None and found.faults == ()
    assert (found.images, found.differing, found.layer_images) == (24, 0, 12)
    assert found.claimed_layers == 3 and found.layer_count == 4 and 0 < found.claimed < found.nodes
    assert found.shown == found.claimed, "every node that it took was also seen at the end of a graph"
    claimed = {layer.name for layer in found.layers if layer.is_claimed}
    assert "relu" not in claimed and len(claimed) >= 2 and all(layer.values for layer in found.layers)
    assert f"computes {found.claimed} of {found.nodes} nodes, 3 of 4 layers: outputs of 24 images" in found.sentence
    assert report.to_json()["provider"]["faults"] == []


def test_nothing_taken_is_a_fault_and_no_proof(images, tmp_path, offered):
    path = tmp_path / "s.onnx"
    student = made(images, path, weight_bits=8, act_bits=8)
    report = check_parity(student, path, [images], provider=offered)
    assert report.provider.claimed == 0 and report.provider.layers == () and not report.passed
    assert report.faults == (f"{offered}: it takes no nodes of this file, so equal outputs prove nothing about it",)
    with pytest.raises(ParityError, match="takes no nodes of this file"):
        report.raise_if_worse()


def test_without_a_provider_nothing_is_said_of_one(images, tmp_path):
    path = tmp_path / "s.onnx"
    report = check_parity(made(images, path), path, [images[:4]])
    assert report.passed and report.provider is None and report.to_json()["provider"] is None


@pytest.mark.parametrize("change", ["bit", "sign of zero", "shape", "text"])
def test_outputs_that_differ_in_a_bit_are_found(change, images, tmp_path, offered):
    """What the tally is given as outputs without the provider is altered, so that the provider's differ."""
    path = tmp_path / "s.onnx"
    made(images, path)
    tally = ProviderTally(load_model(path), path, offered, [], ["logits"], 1)
    (plain,) = tally.session.run(["logits"], {"images": images.numpy()})
    tally.add(images.numpy(), [plain], keep=False)
    assert tally.differing == 0
    other = plain.copy()
    other[3, 0] = np.nextafter(other[3, 0], np.float32(np.inf))
    given = {"bit": [other], "shape": [plain[:, :4]], "text": "it failed", "sign of zero": [plain]}[change]
    if change == "sign of zero":
        tally.session = Fixed(np.zeros((24, 5), np.float32))
        given = [np.full((24, 5), -0.0, np.float32)]
    tally.add(images.numpy(), given, keep=False)
    report = tally.report()
    assert report.differing == {"bit": 1, "sign of zero": 24, "shape": 24, "text": 24}[change]
    assert f"outputs of {report.differing} of 48 images differ" in " ".join(report.faults)
    assert ("it failed" in report.faults[0]) == (change == "text")


class Fixed:
    """A session that gives one answer."""

    def __init__(self, answer):
        self.answer = answer

    def run(self, outputs, feeds):
        return [self.answer]

    def get_provider_graph_assignment_info(self):
        return []


def test_a_layer_that_differs_is_named(images, tmp_path, offered, monkeypatch):
    path = tmp_path / "s.onnx"
    student = made(images, path)
    real, opened = ProviderTally._open, []

    def other(self, model):
        opened.append(model)
        return Wrong(real(self, model)) if len(opened) == 4 else real(self, model)  # the whole file is the first

    monkeypatch.setattr(ProviderTally, "_open", other)
    report = check_parity(student, path, [images], provider=offered)
    third = report.provider.layers[2]
    assert [layer.differing for layer in report.provider.layers if layer.differing] == [1] and third.differing == 1
    assert any(f"1 of {len(opened) - 1} layers differ; the first is {third.name} (1 of" in one for one in report.faults)


class Wrong:
    """A session whose first value is another."""

    def __init__(self, session):
        self.session = session
        self.get_provider_graph_assignment_info = session.get_provider_graph_assignment_info

    def run(self, outputs, feeds):
        (answer,) = self.session.run(outputs, feeds)
        answer.flat[0] += 1
        return [answer]


def test_a_provider_that_is_not_there_is_an_error(images, tmp_path, monkeypatch):
    path = tmp_path / "s.onnx"
    student = made(images, path)
    with pytest.raises(ValueError, match="provider 'Abacus' is not in this onnxruntime"):
        check_parity(student, path, [images], provider="Abacus")
    monkeypatch.setenv("QKD_LOWBIT", "0")
    with pytest.raises(ValueError, match="is not offered here: switched off by QKD_LOWBIT=0"):
        check_parity(student, path, [images], provider=lowbit.PROVIDER)


def test_a_part_holds_what_its_tensor_needs_and_nothing_else(images, tmp_path):
    path = tmp_path / "s.onnx"
    made(images, path)
    model = load_model(path)
    first = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    part, maker = ending_at(model, first.output[0], "UINT8")
    (tmp_path / "part.onnx").write_bytes(part)
    graph = load_model(tmp_path / "part.onnx").graph
    assert [node.name for node in graph.node] == [first.name] == [maker]
    assert {entry.name for entry in graph.initializer} == set(first.input[1:]) and graph.output[0].name == first.output[
        0
    ]
