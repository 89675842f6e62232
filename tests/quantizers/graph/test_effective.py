"""Weights that a network computes: masks stay in the student, all else that would not train alike is named."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from export import check_parity, export_onnx
from qkd.training.state import fill
from quantizers import QuantSpec, RewriteError, Student, calibrate, prepare, quant_layers, settle, unquantized
from quantizers.graph.recording.effective import EffectiveWeights
from quantizers.recipes.carrying import carry_over

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two convolutions; the second may be called in its own way."""

    def __init__(self, call: Callable[[Any, Tensor], Tensor] | None = None, inner: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 6, 3) if inner is None else inner
        self.head, self.call = nn.Linear(6, 4), call
        self.gain = nn.Parameter(torch.ones(6, 1, 1, 1))
        self.register_buffer("mask", (torch.rand(6, 6, 3, 3) < 0.4).float())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.inner(x) if self.call is None else self.call(self, x)
        return self.head(x.relu().mean((2, 3)))


def _steps(net: nn.Module) -> None:
    net.train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), torch.arange(8) % 4).backward()
        optimizer.step()
    net.eval()


def _pruned(inner: nn.Module | None = None, *, structured: bool = False) -> Net:
    net = Net(inner=inner)
    torch.manual_seed(1)
    if structured:
        prune.ln_structured(net.inner, "weight", 0.5, n=2, dim=0)
    else:
        prune.random_unstructured(net.inner, "weight", 0.6)
    return net


def _masked(call: Callable[[Any, Tensor], Tensor]) -> Callable[[], Net]:
    return lambda: Net(call)


MASKED: dict[str, Callable[[], Net]] = {
    "pruned": _pruned,
    "structured": lambda: _pruned(structured=True),
    "pruned twice": lambda: _twice(),
    "transposed": lambda: _pruned(nn.ConvTranspose2d(6, 6, 3, groups=2)),
    "masked in forward": _masked(lambda m, x: F.conv2d(x, m.inner.weight * m.mask, m.inner.bias)),
    "masked, then moved": _masked(lambda m, x: F.conv2d(x, (m.inner.weight * m.mask).flip(2).clone(), m.inner.bias)),
    "masked in place": _masked(lambda m, x: F.conv2d(x, m.inner.weight.clone().mul_(m.mask) / 2, m.inner.bias)),
    "a linear layer": lambda: _head(),
}


def _twice() -> Net:
    net = _pruned()
    prune.l1_unstructured(net.inner, "weight", 0.2)
    return net


def _head() -> Net:
    net = Net()
    prune.random_unstructured(net.head, "weight", 0.5)
    return net


def _student(net: nn.Module, spec: QuantSpec | None = None) -> Student:
    student = prepare(net, spec or QuantSpec(2, 4), IMAGES)
    calibrate(student, IMAGES)
    return student


def _layer(student: Student) -> Any:
    return next(layer for layer in quant_layers(student).values() if layer.mask is not None)


@pytest.mark.parametrize("name", MASKED)
def test_what_a_mask_closes_stays_zero_in_training_and_in_the_file(name: str, tmp_path: Path) -> None:
    student = _student(MASKED[name]())
    layer = _layer(student)
    closed = ~layer.mask
    assert closed.any() and not closed.all() and not layer.weight[closed].any()
    before = layer.weight.detach().clone()
    _steps(student)
    assert not layer.weight[closed].any() and not layer.low_bit_weight()[closed].any()
    assert not layer.integers()[0][closed].any() and not torch.equal(layer.weight, before)
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx").path
    assert check_parity(student, path, IMAGES).passed


@pytest.mark.parametrize("method", ["lsq", "dorefa", "stats"])
def test_every_quantizer_keeps_masks(method: str, tmp_path: Path) -> None:
    student = _student(_pruned(), QuantSpec(2, 4, weight_quantizer=method, first_bits=None, last_bits=None))
    _steps(student)
    settle(student)
    layer = _layer(student)
    assert not layer.low_bit_weight()[~layer.mask].any() and not layer.integers()[0][~layer.mask].any()
    path = export_onnx(student, IMAGES, tmp_path / "student.onnx").path
    assert check_parity(student, path, IMAGES).passed


def test_a_mask_is_part_of_the_state() -> None:
    first, second = _student(_pruned()), _student(_pruned())
    _layer(second).mask.fill_(True)
    second.load_state_dict(first.state_dict())
    assert torch.equal(_layer(first).mask, _layer(second).mask)
    assert torch.equal(_layer(copy.deepcopy(first)).mask, _layer(first).mask)


def test_a_state_of_an_earlier_version_loads_without_its_mask() -> None:
    student = _student(_pruned())
    state = {name: value for name, value in student.state_dict().items() if not name.endswith(".mask")}
    assert len(state) == len(student.state_dict()) - 1
    student.load_state_dict(state)
    assert _layer(student).mask.all()  # there, all weights trained
    others = [_student(_pruned()) for _ in range(2)]
    fill(others[0], state)
    carry_over(others[1], state)
    assert all(_layer(other).mask.all() for other in others)


def test_other_students_have_the_state_that_they_had() -> None:
    assert not any(name.endswith("mask") for name in _student(Net()).state_dict())


def test_a_frozen_weight_needs_no_mask() -> None:
    net = _pruned()
    net.inner.requires_grad_(False)
    assert all(layer.mask is None for layer in quant_layers(_student(net)).values())


class Tanh(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight)


def _parametrized() -> Net:
    net = Net()
    parametrize.register_parametrization(net.inner, "weight", Tanh())
    return net


def _standardized(m: Any, x: Tensor) -> Tensor:
    weight = m.inner.weight
    mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / std, m.inner.bias)


def _pruned_bias() -> Net:
    net = Net()
    prune.random_unstructured(net.inner, "bias", 0.5)
    return net


def _masked_sum(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.inner.weight * m.mask + (1 - m.mask), m.inner.bias)


def _written(write: Callable[[Any, Tensor], Any], *, masked: bool = True) -> Callable[[], Net]:
    """Return a network that writes into a part of its weight, or through another view of it."""

    def call(m: Any, x: Tensor) -> Tensor:
        weight = m.inner.weight * (m.mask if masked else 1.0)
        write(m, weight)
        return F.conv2d(x, weight, m.inner.bias)

    return _masked(call)


WRITTEN: dict[str, Callable[[], Net]] = {
    "constants": _written(lambda _, w: w[:, :, 1, 1].fill_(1.0)),
    "an offset": _written(lambda _, w: w[:, 0].add_(1)),
    "another view": _written(lambda _, w: w.view(-1).add_(1.0)),
    "the weight again": _written(lambda m, w: w.flatten().copy_(m.inner.weight.flatten())),
    "zeros": _written(lambda _, w: w[:3].mul_(0), masked=False),
    "into zeros": _masked(lambda m, x: F.conv2d(x, _first_half(m.inner.weight), m.inner.bias)),
    "joined with zeros": _masked(
        lambda m, x: F.conv2d(x, torch.cat([m.inner.weight[:, :3], torch.zeros(6, 3, 3, 3)], 1))
    ),
}


def _first_half(weight: Tensor) -> Tensor:
    made = torch.zeros(6, 6, 3, 3)
    made[:3] = weight[:3]
    return made


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_into_a_part_of_a_weight_is_in_the_student_and_named(name: str) -> None:
    """A mask of before the write set values to zero that the network has: another function."""
    net = WRITTEN[name]().eval()
    with pytest.warns(UserWarning, match="the network computes .* from its parameters"):
        student = prepare(net, QuantSpec(8, 8), IMAGES)
    calibrate(student, IMAGES, keep_statistics=True)
    student.eval()
    with torch.no_grad(), unquantized(student):
        torch.testing.assert_close(student(IMAGES), net(IMAGES), rtol=0, atol=5e-3 * float(net(IMAGES).abs().max()))


def test_the_check_of_a_student_reads_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        EffectiveWeights, "of", lambda _, weight: torch.zeros_like(weight) if weight.dim() > 1 else None
    )
    with pytest.raises(RewriteError, match="the student would be another function"):
        prepare(Net(), QuantSpec(2, 4), IMAGES)


COMPUTED: dict[str, tuple[Callable[[], Net], str]] = {
    "absolute": (_masked(lambda m, x: F.conv2d(x, m.inner.weight.abs())), r"weight \(abs\)"),
    "rounded": (_masked(lambda m, x: F.conv2d(x, m.inner.weight.mul(8).round() / 8)), r"weight \(round\)"),
    "standardized": (_masked(_standardized), r"weight \(div, mean, std\)"),
    "a learned scale": (_masked(lambda m, x: F.conv2d(x, m.inner.weight * m.gain)), r"weight \(mul\)"),
    "parametrized": (_parametrized, r"inner\.weight \(tanh\)"),
    "a pruned bias": (_pruned_bias, r"inner\.bias \(mask\)"),
    "fixed in part": (_masked(_masked_sum), r"weight \(add\)"),
    "picked twice": (
        _masked(lambda m, x: F.conv2d(x, m.inner.weight[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])][:6])),
        r"weight \(.*(index|getitem)\)",
    ),
    "a factor": (_masked(lambda m, x: m.inner(x) * m.gain.view(1, 6, 1, 1).exp()), r"scale \(exp\)"),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_would_train_otherwise_are_named(name: str) -> None:
    build, found = COMPUTED[name]
    with pytest.warns(UserWarning, match=rf"the network computes .*{found}.*from its parameters") as caught:
        prepare(build(), QuantSpec(2, 4), IMAGES)
    assert len(caught) == 1 and Path(caught[0].filename) == Path(__file__)


ALIKE: dict[str, Callable[[], nn.Module]] = {
    "scaled": _masked(lambda m, x: F.conv2d(x, m.inner.weight * 0.1, m.inner.bias)),
    "a sum": _masked(lambda m, x: F.conv2d(x, m.inner.weight + m.gain, m.inner.bias)),
    "moved": _masked(lambda m, x: F.conv2d(x, -m.inner.weight.flip(2, 3).contiguous(), m.inner.bias)),
    "picked": _masked(lambda m, x: m.inner(x) + F.embedding(torch.arange(6), m.gain.view(6, 1)).view(6, 1, 1)),
    "joined": _masked(lambda m, x: F.conv2d(x, torch.cat([m.inner.weight[:3], m.inner.weight[3:]]))),
    "pruned": _pruned,
    "weight norm": lambda: _with(lambda m: parametrizations.weight_norm(m.inner)),
    "spectral norm": lambda: _with(lambda m: parametrizations.spectral_norm(m.inner)),
    "spectral norm by hooks": lambda: _with(lambda m: spectral_norm(m.inner)),
    "frozen": lambda: _with(lambda m: m.inner.requires_grad_(False), lambda m, x: F.conv2d(x, m.inner.weight.abs())),
}


def _with(change: Callable[[Any], Any], call: Callable[[Any, Tensor], Tensor] | None = None) -> Net:
    net = Net(call)
    change(net)
    return net


@pytest.mark.parametrize("name", ALIKE)
def test_weights_that_train_alike_are_not_named(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(ALIKE[name](), QuantSpec(2, 4), IMAGES)
