"""What is made while the student learns: DAFL's joint step, opponents of two forms, pools that grow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkd.config import AgentConfig
from qkd.config.data_free import ADVERSARIAL, FAMILIES, JOINT, WARMED_UP, DataFreeConfig
from qkd.losses import dafl_generator_loss, dfq_generator_loss, soft_target_loss
from qkd.methods.data_free.inverting.growing import GROWING_INVERSIONS, GrowingPool, due
from qkd.methods.data_free.inverting.meta import MetaInversion
from qkd.methods.data_free.making.adversary import AdversarialSource, Adversary
from qkd.methods.data_free.making.generating import TrainedGenerator, build_generator
from qkd.methods.data_free.making.kinds import weights_of
from qkd.methods.data_free.making.rival import Rival
from qkd.methods.data_free.making.watching import Watched
from qkd.progress import Silent
from qkd.seeding import stream
from qkd.testing import TinyNet, synthetic_splits
from qkd.training.finite import TrainingError
from quantizers import QuantSpec, Student, calibrate, prepare
from quantizers.modes import statistics_kept

pytestmark = pytest.mark.usefixtures("eager")
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"latent": 6, "width": 8}


def low_bit(bits: int = 2) -> Student:
    """Return a student of the teacher's own weights: the two agree on some classes."""
    torch.manual_seed(1)
    images = torch.randn(16, 1, 8, 8)
    student = prepare(teacher(), QuantSpec(weight_bits=bits, act_bits=bits), images)
    calibrate(student, images)
    return student


def teacher() -> nn.Module:
    torch.manual_seed(0)
    net = TinyNet()
    net(torch.randn(16, 1, 8, 8))
    return net.eval()


def adversary(method: str, student: nn.Module, **changes: Any) -> Adversary:
    own = DataFreeConfig(method=method, **SIZES, **changes)  # type: ignore[arg-type]
    net = TrainedGenerator(build_generator(own, synthetic_splits(), 0, "test"))
    return Adversary(net, torch.optim.SGD(net.parameters(), lr=1.0), Watched(teacher()), student, own, 4)


class Fake:
    """Of a job, what a source reads."""

    seed, role, device, splits = 0, "student", CPU, synthetic_splits()
    config = type("Config", (), {"epochs": 2})()

    def __init__(self, folder: Path) -> None:
        self.folder = folder


# --- DAFL as published


def test_a_joint_step_is_one_backward_pass_of_both_losses(tmp_path: Path) -> None:
    student = TinyNet()
    own = adversary("dafl_joint", student)
    before, twin = copy.deepcopy(own.net), copy.deepcopy(student)
    source = AdversarialSource(Fake(tmp_path), own, images=32, agent=AgentConfig(policy="none"))  # type: ignore[arg-type]
    batch = next(iter(source.batches(0, 0, 16)))

    net = copy.deepcopy(before)
    latents, labels = own.latents(16, stream(0, "student", "adversary", 0, 0))
    images = net(latents, labels)
    seen = Watched(teacher())(images)
    assert seen.feature is not None
    generators = dafl_generator_loss(seen.logits, seen.feature, **weights_of("dafl", {}))
    students = soft_target_loss(twin(images.detach()), seen.logits, temperature=1.0)
    (generators + students).backward()

    torch.testing.assert_close(batch.images, images.detach(), msg="the student learns from the images of the step")
    for old, new, expected in zip(before.parameters(), own.net.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(old - new, expected.grad)  # SGD at a rate of 1
    soft_target_loss(student(batch.images), own.teacher.net(batch.images), temperature=1.0).backward()
    for found, expected in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_every_joint_step_has_images_of_its_own(tmp_path: Path) -> None:
    own = adversary("dafl_joint", TinyNet())
    source = AdversarialSource(Fake(tmp_path), own, images=64, agent=AgentConfig(policy="none"))  # type: ignore[arg-type]
    batches = list(source.batches(0, 0, 16))
    assert len({float(batch.images.sum()) for batch in batches}) == 4
    assert all(batch.facts["generator"].isfinite() for batch in batches)


# --- the student as an opponent


@pytest.mark.parametrize("bits", [2, 4])
def test_both_forms_of_the_student_move_images(bits: int) -> None:
    found = {}
    for form in ("ste", "fp_shadow"):
        student = low_bit(bits).train()
        images = torch.randn(8, 1, 8, 8, generator=stream(0, "images")).requires_grad_()
        answer = Rival(student, form)(images)
        (gradient,) = torch.autograd.grad(answer.logits.square().sum(), images)
        assert bool(gradient.isfinite().all()) and bool(gradient.any())
        norms = {name: one for name, one in student.state_dict().items() if "running" in name or "tracked" in name}
        found[form] = answer, gradient, norms
    ste, shadow = found["ste"][0], found["fp_shadow"][0]
    assert ste.low_bit is ste.logits and torch.equal(shadow.low_bit, ste.logits)
    assert not torch.equal(shadow.logits, ste.logits), "the value of the loss changes, so both are told"
    assert not torch.equal(found["ste"][1], found["fp_shadow"][1])
    assert all(torch.equal(found["ste"][2][name], one) for name, one in found["fp_shadow"][2].items())


def test_an_adversary_tells_both_losses() -> None:
    plain = adversary("dfad", low_bit().train())
    shadow = adversary("dfad", low_bit().train(), student_for_generator="fp_shadow")
    plain.learn(8, stream(0, "draw"))
    move = shadow.learn(8, stream(0, "draw"))
    assert set(plain.facts) == {"generator"} and set(shadow.facts) == {"generator", "generator_low_bit"}
    assert shadow.facts["generator"] == move.loss and shadow.facts["generator_low_bit"] == plain.facts["generator"]
    assert shadow.facts["generator"] != shadow.facts["generator_low_bit"]


# --- a generator's warm-up


def warmed_up(method: str, steps: int, student: nn.Module | None = None, **changes: Any) -> Adversary:
    own = adversary(method, low_bit() if student is None else student, warmup_steps=steps, **changes)
    own.optimizer = torch.optim.Adam(own.net.parameters(), lr=1e-2)
    own.warm_up(16, 0, "student", Silent())
    return own


@pytest.mark.parametrize("method", WARMED_UP)
def test_a_warm_up_reads_the_teacher_alone(method: str) -> None:
    student = low_bit().train()
    before = copy.deepcopy(student.state_dict())
    trained, other = warmed_up(method, 30, student), warmed_up(method, 30, low_bit(4))
    assert all(torch.equal(before[name], one) for name, one in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())
    pairs = zip(trained.net.parameters(), other.net.parameters(), strict=True)
    assert all(torch.equal(one, another) for one, another in pairs), "whatever the student is"

    def loss(own: Adversary) -> Tensor:
        return own.learn(16, stream(0, "judged"), alone=True).loss

    assert loss(trained) < 0.9 * loss(warmed_up(method, 0))


def test_what_a_warm_up_minimizes_is_the_loss_without_the_student() -> None:
    own = adversary("dfq", low_bit().train())
    latents, labels = own.latents(16, stream(0, "draw"))
    seen = own.teacher(copy.deepcopy(own.net)(latents, labels))
    whole = dfq_generator_loss(seen.logits, seen.logits, seen.statistics())  # a student that agrees
    assert own.learn(16, stream(0, "draw"), alone=True).loss.item() == pytest.approx(whole.item(), rel=1e-5)


def test_a_warm_up_that_diverges_names_itself() -> None:
    own = adversary("dfq", low_bit(), warmup_steps=3)
    with torch.no_grad():
        next(own.net.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="is nan at step 1 of its warm-up; lower student.data_free.lr"):
        own.warm_up(8, 0, "student", Silent())


@pytest.mark.parametrize("method", [name for name, family in FAMILIES.items() if family in (ADVERSARIAL, JOINT)])
def test_only_losses_with_terms_of_the_teacher_can_warm_up(method: str) -> None:
    if method in WARMED_UP:
        assert DataFreeConfig(method=method, warmup_steps=5).warmup_steps == 5  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=f"`warmup_steps` is for methods .*; the whole loss of `{method}`"):
        DataFreeConfig(method=method, warmup_steps=5)  # type: ignore[arg-type]


def test_a_warm_up_is_written_where_it_is_set() -> None:
    assert "warmup_steps" not in DataFreeConfig(method="dfq").model_dump()
    for steps in (0, 5):
        assert DataFreeConfig(method="dfq", warmup_steps=steps).model_dump()["warmup_steps"] == steps


def test_dfq_warms_up_unless_told_otherwise() -> None:
    assert DataFreeConfig(method="dfq").warmed_up == 300
    assert DataFreeConfig(method="dfq", warmup_steps=0).warmed_up == 0
    for method in ("dafl_joint", "dfad", "noise", "rdskd"):
        assert DataFreeConfig(method=method).warmed_up == 0  # type: ignore[arg-type]
    tried = DataFreeConfig(method="dfq").tried(8)
    assert tried.warmed_up == 2 and DataFreeConfig(**tried.model_dump()) == tried


def test_a_float_student_has_one_form() -> None:
    answer = Rival(TinyNet(), "fp_shadow")(torch.randn(4, 1, 8, 8))
    assert answer.low_bit is answer.logits


def test_statistics_stay_within_a_block() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3))
    before = copy.deepcopy(net.state_dict())
    with statistics_kept(net):
        net(torch.randn(5, 3))
    assert all(torch.equal(before[name], one) for name, one in net.state_dict().items())
    assert [norm.momentum for norm in net] == [None, 0.1]


# --- pools that grow


def growing(method: str, student: nn.Module, **changes: Any) -> GrowingPool:
    sizes = {} if method == "adaptive_inversion" else SIZES
    values = {"pool_images": 24, "batch_size": 8, "pool_steps": 3, "lr": 0.02, **sizes, **changes}
    own = DataFreeConfig(method=method, **values)
    return GrowingPool(Watched(teacher()), student, own, synthetic_splits(), 0, CPU)


def test_batches_are_spread_over_the_training() -> None:
    assert [due(3, step, 6) for step in range(6)] == [1, 1, 2, 2, 3, 3]
    assert [due(4, step, 2) for step in range(2)] == [2, 4], "more batches than steps"
    assert due(1, 0, 100) == due(1, 99, 100) == 1


@pytest.mark.parametrize("method", GROWING_INVERSIONS)
def test_only_later_batches_depend_on_the_student(method: str, tmp_path: Path) -> None:
    parts: list[list[Tensor]] = []
    for number, bits in enumerate((2, 4)):
        student = low_bit(bits).train()
        state, pool = copy.deepcopy(student.state_dict()), growing(method, student)
        assert pool.warm_up == 1
        pool.settle_in(tmp_path / str(number))
        pool.grow(3)
        parts.append(pool._parts)
        assert all(torch.equal(state[name], one) for name, one in student.state_dict().items())
        assert all(parameter.grad is None for parameter in student.parameters())
        assert student.training and int(pool.grown.made) == 3 and pool.facts["inversion"].isfinite()
    assert torch.equal(parts[0][0], parts[1][0])
    assert not torch.equal(parts[0][1], parts[1][1])


@pytest.mark.parametrize("method", GROWING_INVERSIONS)
def test_a_pool_against_float_weights_tells_both_losses(method: str, tmp_path: Path) -> None:
    pool = growing(method, low_bit(), student_for_generator="fp_shadow")
    pool.settle_in(tmp_path)
    pool.grow(2)
    assert pool.facts["inversion"] != pool.facts["inversion_low_bit"] and pool.facts["inversion_low_bit"].isfinite()


def test_a_pool_is_read_where_it_was_made_and_no_further(tmp_path: Path) -> None:
    student, first = low_bit(), growing("cmi_adversarial", low_bit())
    first.settle_in(tmp_path)
    first.grow(3)
    again = growing("cmi_adversarial", student)
    again.grown.made.fill_(2)  # as a checkpoint has it: the third was made, and its step was not taken
    again.settle_in(tmp_path)
    again.grow(2)
    assert all(torch.equal(one, other) for one, other in zip(again._parts, first._parts[:2], strict=True))
    again.grow(3)
    assert torch.equal(again._parts[2], first._parts[2])
    (tmp_path / "pool" / "batch_00001.npz").unlink()
    late = growing("cmi_adversarial", student)
    late.grown.made.fill_(3)
    late.settle_in(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"batch_00001.npz is missing: the resumed checkpoint belongs to 3"):
        late.grow(3)


def test_what_calibrates_the_student_is_its_first_batch(tmp_path: Path) -> None:
    pool = growing("adaptive_inversion", low_bit())
    images, labels = pool.draw(4, stream(0, "calibration"))
    assert images.shape == (4, 1, 8, 8) and labels is not None and int(pool.grown.made) == 1
    pool.settle_in(tmp_path)
    pool.grow(1)
    assert (tmp_path / "pool" / "batch_00000.npz").is_file() and len(pool._parts) == 1


def test_the_meta_generator_brings_later_batches_nearer() -> None:
    own = DataFreeConfig(method="fast_dfkd", pool_images=160, batch_size=16, pool_steps=4, lr=3e-3, **SIZES)
    invert, state = MetaInversion(Watched(teacher()), own, synthetic_splits(), 0, CPU), {}
    for index in range(10):
        taught = invert(index, 16, state)
        state = taught.state
    fresh = invert(9, 16, {})
    assert taught.loss < fresh.loss - 1, "with the same latents and classes"
    assert any(name.startswith("moments/") for name in state)


def test_competition_finds_images_on_which_the_student_differs(tmp_path: Path) -> None:
    """Against the student the divergence of both nets on a batch is larger than without it."""
    student, watched = low_bit().eval(), teacher()
    from qkd.losses import competition_loss

    found = []
    for weight in (0.0, 20.0):
        changes = {"weights": {"competition_weight": weight, "statistics_weight": 0.1}, "pool_steps": 30, "lr": 0.05}
        pool = growing("adaptive_inversion", student, **changes)
        pool.settle_in(tmp_path / str(weight))
        pool.grow(2)
        with torch.no_grad():
            found.append(float(competition_loss(student(pool._parts[1]), watched(pool._parts[1]))))
    assert found[1] < found[0]
