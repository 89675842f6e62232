"""Student ensembles with one stem: it runs once, all nets move it, and none but the student keeps it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from export import export_onnx
from qkd.config import PeerConfig, PeersConfig
from qkd.files import read_safetensors
from qkd.losses import cross_entropy_loss
from qkd.methods.peers.nets import peer_net
from qkd.methods.peers.stem import SharedStem, lend
from qkd.methods.peers.step import Learner, PeerAdapters, StudentEnsembleStep
from qkd.nets import build_net
from qkd.roles.nets import load_student
from qkd.testing import TinyNet, run_tiny, synthetic_splits, tiny_config
from qkd.training.job import Batch, StepResult
from quantizers import QuantSpec, Student, calibrate, freeze_batch_norm, prepare

pytestmark = pytest.mark.usefixtures("unfused")
STEM = ("stem.0", "stem.1")


def net(seed: int = 0, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return TinyNet(width=width)


def batch(size: int = 16) -> Batch:
    raw, labels = synthetic_splits().train.batch(torch.arange(size), "cpu")
    return Batch(raw.float() / 128 - 1, labels, raw, 0, 0)


def low_bit(bits: int, seed: int = 0) -> Student:
    student = prepare(net(seed), QuantSpec(weight_bits=bits, act_bits=bits), batch().images)
    return student


def ensemble(student: nn.Module, peers: list[nn.Module], *, leads: bool = False) -> StudentEnsembleStep:
    stem = SharedStem(student, STEM)
    for number, peer in enumerate(peers):
        lend(stem, peer, f"peer_{number}")
    own = Learner("student", student, ("relu",), getattr(student, "tap_paths", None))
    others = [
        Learner(f"peer_{number}", peer, ("relu",), getattr(peer, "tap_paths", None))
        for number, peer in enumerate(peers)
    ]
    order = [own, *others] if leads else [*others, own]
    return StudentEnsembleStep(
        order, PeerAdapters([[(6, 8, 8)]] * len(order)), student=0 if leads else -1, stem=stem
    )  # fmt: skip


def run(step: StudentEnsembleStep) -> StepResult:
    with step.tapped():
        return step(batch())


def test_the_stem_runs_once_and_gets_the_gradient_of_all_nets() -> None:
    student, peers = net(0), [net(1), net(2)]
    reference = copy.deepcopy([student, *peers])
    calls: list[int] = []
    student.get_submodule("stem.0").register_forward_hook(lambda *_: calls.append(1))
    result = run(ensemble(student, peers))
    (0.7 * result.terms["labels"]).backward()
    assert len(calls) == 1

    # by hand: one stem, its output into the rest of each net
    base = reference[0]
    after = base.get_submodule("stem")(batch().images)
    logits = [_rest(one, after) for one in reference]
    (0.7 * sum(cross_entropy_loss(one, batch().labels) for one in logits)).backward()  # type: ignore[union-attr]
    for (name, found), expected in zip(student.named_parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)
    for name, one in student.named_buffers():
        torch.testing.assert_close(one, dict(base.named_buffers())[name], msg=f"{name}: a batch is seen once")


def _rest(one: nn.Module, after: Tensor) -> Tensor:
    own = copy.copy(one)
    modules: dict[str, Any] = dict(one.named_children())
    x = modules["relu"](after + modules["right"](modules["left"](after)))
    assert own is not one
    logits: Tensor = modules["head"](modules["flatten"](modules["pool"](x)))
    return logits


@pytest.mark.parametrize("leads", [False, True])
def test_a_low_bit_student_lends_its_stem_to_nets_of_any_bits(leads: bool) -> None:
    student, peers = low_bit(2), [net(1), low_bit(4, seed=2)]
    before = set(student.state_dict())
    step = ensemble(student, peers, leads=leads)
    calibrate(student, batch().images)
    calibrate(peers[1], batch().images)  # its stem is the student's, and stays as it is
    statistics = copy.deepcopy({name: one for name, one in student.state_dict().items() if "running" in name})
    calibrate(peers[1], batch().images)
    assert all(torch.equal(statistics[name], student.state_dict()[name]) for name in statistics)
    for one in (student, *peers):
        one.train()
        if one is not peers[0]:  # which is in full precision
            freeze_batch_norm(one, False)
    result = run(step)
    result.loss.backward()
    assert set(student.state_dict()) == before, "the student has all of its own"
    for peer in peers:
        assert not [name for name, _ in peer.named_parameters() if name.startswith(STEM)]
        assert all(parameter.grad is not None for parameter in peer.parameters())
    stem = student.get_submodule("stem.0").weight
    assert stem.grad is not None and bool(stem.grad.isfinite().all()) and bool(stem.grad.any())
    assert set(result.facts) == {"peer_0_accuracy", "peer_1_accuracy"}


def test_outside_a_step_a_peer_asks_the_stem_as_it_will_be_used() -> None:
    student, peer = low_bit(2), net(1)
    calibrate(student, batch().images)
    ensemble(student, [peer])
    with torch.no_grad():
        found = peer.eval()(batch().images)
        layer = student.eval().get_submodule("stem.0")
        expected = peer.get_submodule("stem.2")(layer(layer.source(batch().images)))  # type: ignore[operator]
        torch.testing.assert_close(found, _rest(peer, expected))


def test_the_leaders_features_get_no_gradient() -> None:
    student, peer = net(0), net(1)
    result = run(ensemble(student, [peer], leads=True))
    result.terms["features"].backward(retain_graph=True)
    assert student.get_submodule("right.0").weight.grad is None, "only the stem, which the peer reads, too"
    assert peer.get_submodule("right.0").weight.grad is not None


@pytest.mark.parametrize(
    ("student", "peer", "paths", "match"),
    [
        (net, net, ("conv1", "bn1"), "the student has no convolution `conv1` with batch norm `bn1`"),
        (net, net, ("stem.1", "stem.0"), "the student has no convolution `stem.1`"),
        (lambda: low_bit(2), net, ("stem.0",), "no convolution `stem.0` without batch norm"),
        (net, lambda: net(width=4), STEM, "the stem of peer_0 has 4 channels, the student's 6"),
        (net, lambda: nn.Linear(2, 2), STEM, "peer_0 has no convolution `stem.0`"),
    ],
)
def test_refused(student: Any, peer: Any, paths: tuple[str, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        lend(SharedStem(student(), paths), peer(), "peer_0")


# --- widths


@pytest.mark.parametrize(("width", "channels"), [(0.2, [3, 6, 13]), (0.6, [10, 19, 38]), (1.0, [16, 32, 64])])
def test_a_width_scales_the_stages_and_leaves_the_stem(width: float, channels: list[int]) -> None:
    spelled = f'resnet8{{"width": {width}}}'
    found = build_net(spelled, classes=4, channels=1, image_size=8)
    assert found.get_submodule("conv1").out_channels == 16
    stages = [found.get_submodule(f"layer{number}.0.conv1").out_channels for number in (1, 2, 3)]
    assert stages == channels and found(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    with pytest.raises(ValueError, match="width must be a positive factor"):
        build_net('resnet8{"width": 0}', classes=4, channels=1, image_size=8)


def test_a_peer_of_another_width(data: Path) -> None:
    config = tiny_config(data, {"teacher.net": "resnet20"})
    assert peer_net(config, PeerConfig(width=0.5)) == 'resnet20{"width": 0.5}'
    assert peer_net(config, PeerConfig(net="resnet8", width=0.5)) == 'resnet8{"width": 0.5}'
    assert peer_net(config, PeerConfig()) == "resnet20"
    assert set(PeersConfig(nets=(PeerConfig(),)).model_dump()) == {
        "nets", "taps", "temperature", "label_weight", "feature_weight", "ensemble_weight", "lr_factor"
    }, "hashes of older runs do not change"  # fmt: skip


# --- a run


def test_a_run_with_one_stem_exports_the_student_alone(data: Path, tmp_path: Path) -> None:
    peers = {
        "nets": [{"width": 0.5}, {"weight_bits": 4, "act_bits": 4}],
        "stem": ["conv1", "bn1"],
        "leader": "student",
        "taps": ["layer1", "layer3"],
    }
    config = tiny_config(data, {"student.peers": peers})
    with run_tiny(config, tmp_path, "teacher", "search", "distill") as opened:
        student = load_student(opened)
        names = set(read_safetensors(opened.path / "student" / "weights.safetensors"))
    assert not [name for name in names if "peer" in name] and "conv1.weight" in names
    export_onnx(student, torch.zeros(1, 1, 8, 8), tmp_path / "student.onnx")
    shapes = {tuple(one.dims) for one in onnx.load(tmp_path / "student.onnx").graph.initializer}
    assert not [shape for shape in shapes if len(shape) == 4 and shape[0] == 8], "no layer of the narrow peer"
