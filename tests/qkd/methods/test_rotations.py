"""HSSAKD's steps: what is learned from what, identities, gradients' ways, and that nets are only read where fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.config import RotationsConfig
from qkd.losses.turns import joint_labels, turn_images
from qkd.methods.rotations.branched import BranchClassifier, BranchedNet
from qkd.methods.rotations.method import Rotations
from qkd.methods.rotations.step import BranchStep, PeerStep, RotationStep
from qkd.nets import build_net
from qkd.nets.branches import build_branches, stage_names
from qkd.seeding import global_stream
from qkd.terms.modules import feature_shapes
from qkd.testing import synthetic_splits, tiny_config
from qkd.training import Batch
from quantizers import QuantSpec, calibrate, prepare

pytestmark = pytest.mark.usefixtures("unfused")

CLASSES, SIZE = 3, 8
OFFLINE = RotationsConfig.model_validate({"teacher_branches": {"train": {"epochs": 1}}})
ONLINE = RotationsConfig(mode="online")


def branched(name: str, seed: int, *, bits: int | None = None) -> BranchedNet:
    """Return a net, low-bit where ``bits`` are given, with branches on its stages."""
    with global_stream(seed, "net"):
        net = build_net(name, classes=CLASSES, channels=1, image_size=SIZE)
        taps = stage_names(net)
        shapes = feature_shapes(net, taps, torch.zeros(1, 1, SIZE, SIZE))
        branches = build_branches(net, taps, list(shapes.values()), outputs=4 * CLASSES)
    if bits is None:
        return BranchedNet(net, branches, taps)
    student = prepare(net, QuantSpec(weight_bits=bits, act_bits=bits), example_inputs=torch.zeros(2, 1, SIZE, SIZE))
    calibrate(student, turn_images(batch(16).images))
    return BranchedNet(student.train(), branches, taps, tap_paths=student.tap_paths, role="student")


def batch(count: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, SIZE, SIZE, generator=generator)
    return Batch(images, torch.arange(count) % CLASSES, torch.zeros(count, 1, SIZE, SIZE, dtype=torch.uint8), 0, 0)


def fixed(net: BranchedNet) -> BranchedNet:
    for module in (net.net, net.branches):
        module.eval().requires_grad_(False)
    return net


def snapshot(*modules: nn.Module) -> list[Tensor]:
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def same(before: list[Tensor], *modules: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, snapshot(*modules), strict=True))


def values(terms: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in terms.items()}


def test_a_student_equal_to_its_teacher_has_only_the_task_to_learn() -> None:
    teacher = fixed(branched("resnet8", 0))
    student = fixed(branched("resnet8", 0))  # eval mode: batch norm computes the same
    step = RotationStep(student, teacher, OFFLINE)
    with step.tapped():
        result = step(batch())
    terms = values(result.terms)
    assert terms["branch_soft_target"] == 0 and terms["soft_target"] == 0
    assert float(result.loss) == terms["cross_entropy"] > 0


def test_the_offline_loss_is_the_published_sum() -> None:
    teacher, student = fixed(branched("wrn_16_1", 1)), fixed(branched("resnet8", 2))
    for net in (teacher, student):
        net.net.double()
        net.branches.double()
    given = batch()
    given = Batch(given.images.double(), given.labels, given.raw, 0, 0)
    step = RotationStep(student, teacher, OFFLINE)
    with step.tapped():
        result = step(given)
        images = turn_images(given.images)
        s, t = student(images), teacher(images)

    def divergence(own: Tensor, other: Tensor) -> Tensor:
        p, q = torch.softmax(other / 3, 1), torch.softmax(own / 3, 1)
        return 9 * (p * (p.log() - q.log())).sum(1).mean()

    expected = functional.cross_entropy(s.logits[::4], given.labels) + divergence(s.logits, t.logits)
    expected = expected + sum(divergence(a, b) for a, b in zip(s.branches, t.branches, strict=True))
    assert result.loss.dtype == torch.float64
    assert abs(float(result.loss - expected)) < 1e-9
    assert torch.equal(result.logits, s.logits[::4])


@pytest.mark.parametrize("bits", [2, 4])
def test_an_offline_student_learns_and_the_teacher_is_only_read(bits: int) -> None:
    teacher, student = fixed(branched("resnet20", 1)), branched("resnet8", 2, bits=bits)
    before = snapshot(teacher.net, teacher.branches)
    step = RotationStep(student, teacher, OFFLINE)
    parameters = [*student.net.parameters(), *student.branches.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    losses = []
    with step.tapped():
        for _ in range(12):
            optimizer.zero_grad()
            result = step(batch())
            result.loss.backward()
            optimizer.step()
            losses.append(values({**result.terms, "loss": result.loss}))
    assert losses[-1]["loss"] < 0.6 * losses[0]["loss"]
    assert losses[-1]["branch_soft_target"] < losses[0]["branch_soft_target"]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)
    assert same(before, teacher.net, teacher.branches)
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.net.modules())


def test_gradients_of_the_branches_flow_into_the_student() -> None:
    only = OFFLINE.model_copy(update={"task_weight": 0.0, "logit_weight": 0.0})
    student = branched("resnet8", 2, bits=2)
    step = RotationStep(student, fixed(branched("resnet8", 1)), only)
    with step.tapped():
        result = step(batch())
    assert set(result.terms) == {"branch_soft_target"}
    result.loss.backward()
    stem = next(p for name, p in student.net.named_parameters() if name.startswith("conv1") and p.dim() == 4)
    assert stem.grad is not None and bool(stem.grad.any())


def test_weights_scale_the_terms() -> None:
    teacher, student = fixed(branched("resnet8", 1)), fixed(branched("resnet8", 2))
    config = OFFLINE.model_copy(update={"task_weight": 0.5, "branch_weight": 2.0, "logit_weight": 0.25})
    step = RotationStep(student, teacher, config)
    with step.tapped():
        result = step(batch())
    terms = values(result.terms)
    expected = 0.5 * terms["cross_entropy"] + 2 * terms["branch_soft_target"] + 0.25 * terms["soft_target"]
    assert float(result.loss) == pytest.approx(expected, rel=1e-6)


def test_the_teacher_sees_its_own_view_turned() -> None:
    teacher, student = fixed(branched("resnet8", 1)), fixed(branched("resnet8", 1))
    other = batch(seed=5)
    step = RotationStep(student, teacher, OFFLINE, view=lambda _: other.images)
    with step.tapped():
        result = step(batch())
        seen = teacher(turn_images(other.images))
        own = student(turn_images(batch().images))
    soft = functional.kl_div(
        torch.log_softmax(own.logits / 3, 1), torch.log_softmax(seen.logits / 3, 1), log_target=True, reduction="sum"
    )
    assert float(result.terms["soft_target"]) == pytest.approx(float(soft) / 24 * 9, rel=1e-5)
    assert values(result.terms)["branch_soft_target"] > 0


def test_branches_behind_a_teacher_learn_and_leave_every_bit_of_it() -> None:
    teacher = branched("resnet8", 0)
    teacher.net.eval().requires_grad_(False)
    teacher.branches.train()
    before = snapshot(teacher.net)
    step = BranchStep(teacher, joint=False)
    optimizer = torch.optim.Adam(teacher.branches.parameters(), lr=3e-3)
    losses = []
    with step.tapped():
        for _ in range(12):
            optimizer.zero_grad()
            result = step(batch())
            result.loss.backward()
            optimizer.step()
            losses.append(float(result.loss.detach()))
    assert set(result.terms) == {"joint_labels"} and losses[-1] < 0.6 * losses[0]
    assert same(before, teacher.net)
    assert result.logits.shape == (6, CLASSES)
    assert torch.allclose(result.logits.exp().sum(1), torch.ones(6), atol=1e-5)


def test_joint_branches_train_the_net_along() -> None:
    teacher = branched("resnet8", 0)
    step = BranchStep(teacher, joint=True)
    with step.tapped():
        result = step(batch())
        output = teacher(turn_images(batch().images))
    targets = joint_labels(batch().labels)
    expected = functional.cross_entropy(output.logits[::4], batch().labels)
    expected = expected + sum(functional.cross_entropy(joint, targets) for joint in output.branches)
    assert float(result.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in teacher.net.parameters())


def test_what_branches_say_of_the_class() -> None:
    teacher = fixed(branched("resnet8", 0))
    model = BranchClassifier(teacher)
    assert {name.split(".")[0] for name in model.state_dict()} == {"branches"}
    before = snapshot(teacher.net)
    model.train()
    assert not teacher.net.training
    model.eval()
    images = batch().images
    log = model(images)
    with teacher.tapped():
        joint = teacher(images).branches
    expected = torch.stack([torch.softmax(one, 1).reshape(6, CLASSES, 4).sum(2) for one in joint]).mean(0)
    assert torch.allclose(log.exp(), expected, atol=1e-6)
    assert same(before, teacher.net) and not any(module._forward_hooks for module in teacher.net.modules())


def test_equal_peers_have_only_labels_to_learn_and_both_learn() -> None:
    student, peer = branched("resnet8", 0), branched("resnet8", 0)
    step = PeerStep(student, peer, ONLINE)
    with step.tapped():
        result = step(batch())
    terms = values(result.terms)
    names = {"cross_entropy", "joint_labels", "branch_soft_target", "soft_target"}
    assert set(terms) == names | {f"peer_{name}" for name in names}
    zero = ("branch_soft_target", "soft_target", "peer_branch_soft_target", "peer_soft_target")
    assert [terms[name] for name in zero] == [0, 0, 0, 0]
    assert terms["cross_entropy"] == terms["peer_cross_entropy"]
    assert float(result.loss.detach()) == pytest.approx(2 * (terms["cross_entropy"] + terms["joint_labels"]), rel=1e-6)
    result.loss.backward()
    for net in (student, peer):
        assert all(p.grad is not None for module in (net.net, net.branches) for p in module.parameters())


def test_a_peers_gradient_is_its_own_part_of_the_loss() -> None:
    """The student's soft targets are constants to the peer: its gradient is that of its own terms."""
    student, peer = fixed(branched("resnet8", 2)), branched("wrn_16_1", 3)
    step = PeerStep(student, peer, ONLINE)
    with step.tapped():
        result = step(batch())
    own = [value for name, value in result.terms.items() if name.startswith("peer_")]
    parameters = [*peer.net.parameters(), *peer.branches.parameters()]
    whole = torch.autograd.grad(result.loss, parameters, retain_graph=True)
    part = torch.autograd.grad(sum(own[1:], own[0]), parameters)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("images", [torch.zeros(4, 1, 8, 8), torch.full((4, 1, 8, 8), 1e4)], ids=["zeros", "huge"])
def test_extreme_images_give_finite_losses_and_gradients(images: Tensor) -> None:
    teacher, student = fixed(branched("resnet8", 1)), branched("resnet8", 2, bits=2)
    step = RotationStep(student, teacher, OFFLINE)
    with step.tapped():
        result = step(Batch(images, torch.tensor([0, 1, 2, 0]), images.to(torch.uint8), 0, 0))
    result.loss.backward()
    assert bool(result.loss.isfinite())
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in student.net.parameters())


def test_refusals() -> None:
    student, teacher = branched("resnet8", 0), branched("resnet8", 1)
    fewer = BranchedNet(teacher.net, nn.ModuleList(teacher.branches[:2]), teacher.paths[:2])
    for step in (RotationStep, PeerStep):
        with pytest.raises(ValueError, match=r"student has 3 \(layer1, layer2, layer3\) and the teacher 2"):
            step(student, fewer, OFFLINE)
    with pytest.raises(ValueError, match="the teacher needs one branch per tap, got 3 branches and 2 taps"):
        BranchedNet(teacher.net, teacher.branches, ["layer1", "layer2"], role="teacher")
    with pytest.raises(ValueError, match="the student has no module 'layer9'"):
        BranchedNet(student.net, nn.ModuleList(student.branches[:1]), ["layer9"], role="student")
    step = RotationStep(student, teacher, OFFLINE)
    flat = torch.zeros(2, 1, 8, 4)
    with step.tapped(), pytest.raises(ValueError, match="only square images"):
        step(Batch(flat, torch.tensor([0, 1]), flat.to(torch.uint8), 0, 0))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({}, "`teacher_branches` is required if `mode` is offline"),
        ({"mode": "online", "teacher_branches": {"joint": True}}, "is required if `mode` is offline"),
        ({"teacher_branches": {}}, "`train` is required if `joint` is false"),
        ({"teacher_branches": {"joint": True, "train": {"epochs": 1}}}, "`train` is required if"),
        (
            {"teacher_branches": {"joint": True}, "student_taps": ["a"], "teacher_taps": ["a", "b"]},
            "must have the same length, got 1 and 2",
        ),
        (
            {"teacher_branches": {"joint": True}, "task_weight": 0, "branch_weight": 0, "logit_weight": 0},
            "nothing to learn from",
        ),
        ({"teacher_branches": {"joint": True}, "joint_weight": 0.5}, "is for mode online"),
    ],
)
def test_config_refusals(values: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RotationsConfig.model_validate(values)


def test_images_that_are_not_square_cannot_be_turned(tmp_path: Path) -> None:
    splits = dataclasses.replace(synthetic_splits(), image_size=(8, 6))
    changes = {"student.rotations": {"mode": "online"}}
    with pytest.raises(ValueError, match=r"student.rotations takes square images, got 8x6"):
        Rotations(tiny_config(tmp_path, changes)).images(splits)


@pytest.mark.parametrize("kind", ["offline", "online", "joint"])
def test_nets_that_end_in_softmax_are_refused(kind: str) -> None:
    """Whichever of the two it is: each loss would soften its probabilities once more."""

    def soft(seed: int) -> BranchedNet:
        own = branched("resnet8", seed)
        own.net.register_forward_hook(lambda _net, _read, logits: logits.softmax(1))
        return own

    plain, ended = branched("resnet8", 0), soft(1)
    if kind == "joint":
        steps = {"teacher": BranchStep(ended, joint=True)}
    elif kind == "online":
        steps = {"teacher": PeerStep(plain, ended, ONLINE), "student": PeerStep(ended, plain, ONLINE)}
    else:
        steps = {
            "teacher": RotationStep(plain, fixed(ended), OFFLINE),
            "student": RotationStep(soft(2), plain, OFFLINE),
        }
    for who, step in steps.items():
        with step.tapped(), pytest.raises(ValueError, match=f"the {who} returns probabilities"):
            step(batch())
