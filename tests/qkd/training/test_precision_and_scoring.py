"""Devices, precision and threads; scoring a split and restoring modes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qkd.config import DataConfig
from qkd.data import normalize
from qkd.report.caveats import accuracy_caveats
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import accuracy, choose_precision, cpu_threads
from qkd.training.precision import choose_device
from quantizers import QuantSpec, batch_statistics, calibrate, freeze_batch_norm, prepare
from quantizers.modes import evaluating

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DATA = DataConfig(name="npz", path=Path("unused"), eval_batch_size=7)


@pytest.mark.parametrize(
    ("requested", "dtype", "is_noted"),
    [("float32", None, False), ("bf16", torch.bfloat16, False), ("fp16", None, True)],
)
def test_precision_on_a_cpu(requested, dtype, is_noted: bool) -> None:
    precision, note = choose_precision(requested, CPU)
    assert precision.dtype is dtype and bool(note) == is_noted and not precision.needs_scaler
    product = nn.Linear(4, 4)
    with precision.context():
        assert product(torch.ones(1, 4)).dtype is (dtype or torch.float32)
    with precision.context(enabled=False):
        assert product(torch.ones(1, 4)).dtype is torch.float32


def test_fp16_on_cuda_needs_scaled_gradients() -> None:
    precision, note = choose_precision("fp16", CUDA)
    assert precision.dtype is torch.float16 and precision.needs_scaler and note == ""


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU and choose_device("cpu") == CPU
    with pytest.raises(ValueError, match="cuda:1 was requested, but PyTorch finds no such device"):
        choose_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == CUDA and choose_device("cuda:0").index == 0
    with pytest.raises(ValueError, match="cuda:1"):
        choose_device("cuda:1")


def test_threads_are_restored_on_failure() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    with cpu_threads(None):
        assert torch.get_num_threads() == before


class Oracle(nn.Module):
    """Knows the answers to some of the images."""

    def __init__(self, images: Tensor, labels: Tensor, right: int) -> None:
        super().__init__()
        self.images, self.right = images, right
        self.answers = torch.where(torch.arange(len(labels)) < right, labels, (labels + 1) % 4)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        which = (self.images[None] == x[:, None]).flatten(2).all(2).float().argmax(1)
        return nn.functional.one_hot(self.answers[which], 4).float()


@pytest.mark.parametrize("right", [0, 5, 18])
def test_accuracy_counts(right: int) -> None:
    splits = synthetic_splits(val=18)
    raw, labels = splits.val.batch(torch.arange(18), "cpu")
    oracle = Oracle(normalize(raw, splits.mean, splits.std), labels, right)
    assert accuracy(oracle, splits.val, splits, DATA, CPU) == right / 18
    assert oracle.training


def test_an_empty_split_has_no_accuracy() -> None:
    splits = synthetic_splits(val=0)
    assert accuracy(TinyNet(), splits.val, splits, DATA, CPU) is None


def test_every_module_gets_its_mode_back() -> None:
    net = TinyNet().train()
    net.left.eval()
    with pytest.raises(KeyError), evaluating(net):
        assert not any(module.training for module in net.modules())
        raise KeyError
    assert net.training and net.stem[1].training and not net.left.training and not net.left[1].training


# --- role-kd as released: batch norm on each batch's own statistics


def _by_batches(net: nn.Module, size: int) -> float:
    """Return the accuracy by hand: training mode, full batches alone."""
    splits = synthetic_splits()
    raw, labels = splits.test.batch(torch.arange(len(splits.test) // size * size), "cpu")
    parts = normalize(raw, splits.mean, splits.std).split(size)
    right = torch.cat([net(part).argmax(1) for part in parts]) == labels
    return right.double().mean().item()


@pytest.mark.parametrize("size", [6, 10])
def test_scores_on_the_statistics_of_batches(size: int) -> None:
    torch.manual_seed(0)
    net, splits = TinyNet(), synthetic_splits()
    twin = copy.deepcopy(net).train()
    before = copy.deepcopy(net.state_dict())
    data = DATA.model_copy(update={"batch_statistics": size})
    found = accuracy(net.eval(), splits.test, splits, data, CPU)
    assert found == pytest.approx(_by_batches(twin, size)), "of 32 images, those in full batches"
    assert all(torch.equal(before[name], one) for name, one in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    with pytest.raises(ValueError, match="at least one full batch of 64 images, got 32"):
        accuracy(net, splits.test, splits, DATA.model_copy(update={"batch_statistics": 64}), CPU)


def test_a_students_scores_on_the_statistics_of_batches() -> None:
    """Its layers leave the deployed arithmetic, drop-out stays off, and it is the same behind the score."""
    torch.manual_seed(0)
    splits = synthetic_splits()
    images = normalize(splits.train.batch(torch.arange(16), "cpu")[0], splits.mean, splits.std)
    student = prepare(TinyNet(dropout=0.5), QuantSpec(weight_bits=4, act_bits=4), images)
    calibrate(student, images)
    freeze_batch_norm(student)
    before, out = copy.deepcopy(student.state_dict()), student.eval()(images)
    with batch_statistics(student), torch.no_grad():
        first, second = student(images), student(images)
    assert torch.equal(first, second) and not torch.equal(first, out)
    twin = copy.deepcopy(student)
    freeze_batch_norm(twin, False)
    twin.train()
    for module in twin.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    torch.testing.assert_close(first, twin(images).detach(), atol=1e-4, rtol=0)  # the last layer's bias is rounded
    assert torch.equal(student(images), out)
    assert all(torch.equal(before[name], one) for name, one in student.state_dict().items())


def test_dropout_of_float_nets_stays_off() -> None:
    net = TinyNet(dropout=0.5)
    with batch_statistics(net):
        assert net.get_submodule("stem.1").training and not net.get_submodule("dropout").training
    assert net.training


def test_a_report_says_whose_statistics_scores_have() -> None:
    found = {"student": {"test_accuracy": 0.5, "chance_accuracy": 0.1, "batch_statistics": 128}}
    assert any("statistics of each batch of 128 test images" in line for line in accuracy_caveats(found, 100_000))
    del found["student"]["batch_statistics"]
    assert not any("statistics" in line for line in accuracy_caveats(found, 100_000))
