"""The MetaDistil step: what it leaves alone, what it teaches, with low-bit students of another architecture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qkd.agents import build_agent
from qkd.config import AgentConfig, DataConfig, MetaConfig, TermConfig, TrainConfig
from qkd.data import Splits, normalize, take_quiz
from qkd.methods.meta_distil.gradient import Order
from qkd.methods.meta_distil.quiz import Quiz
from qkd.methods.meta_distil.schedule import MetaSchedule
from qkd.methods.meta_distil.step import MetaRates, MetaStep
from qkd.progress import Silent
from qkd.seeding import global_stream
from qkd.terms import build_terms
from qkd.terms.step import DistillStep
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch, Job, Partner, Phase, TrainingError
from qkd.training.loop import Trainer
from quantizers import QuantSpec, Student, calibrate, freeze_batch_norm, prepare, quantizer_scales

pytestmark = pytest.mark.usefixtures("one_eager_thread")
ORDERS: tuple[Order, ...] = ("second", "first")
LOGITS = (TermConfig(loss="cross_entropy", weight=0.5), TermConfig(loss="soft_target", weight=0.5))
QUANTIZERS = {
    "w2a2": QuantSpec(2, 2),
    "w4a4": QuantSpec(4, 4),
    "per tensor": QuantSpec(2, 2, per_channel=False),
    "pact": QuantSpec(2, 2, act_quantizer="pact"),
    "dorefa": QuantSpec(2, 2, weight_quantizer="dorefa", act_quantizer="dorefa"),
}


class Teacher(nn.Module):
    """Another architecture than the student's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.pool(self.stem(x)).flatten(1)))
        return logits


@pytest.fixture(scope="module")
def splits() -> Splits:
    return take_quiz(synthetic_splits(train=80, val=8), 24, seed=0)


def images_of(splits: Splits, count: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    raw, labels = splits.train.batch(torch.arange(count), "cpu")
    return normalize(raw, splits.mean, splits.std), labels, raw


def batch_of(splits: Splits, **changes: Any) -> Batch:
    images, labels, raw = images_of(splits)
    return Batch(**{"images": images, "labels": labels, "raw": raw, "epoch": 0, "step": 0, **changes})


def nets(splits: Splits, spec: QuantSpec = QUANTIZERS["w2a2"]) -> tuple[Student, nn.Module]:
    with global_stream(0, "init"):
        net, teacher = TinyNet(dropout=0.2), Teacher()
    images = images_of(splits, 32)[0]
    student = prepare(net, spec, example_inputs=images[:2])
    calibrate(student, [images])
    student.train()
    return student, teacher.eval()


def quiz_of(splits: Splits) -> Quiz:
    assert splits.quiz is not None
    return Quiz(splits.quiz, batch_size=16, mean=splits.mean, std=splits.std, seed=0, device=torch.device("cpu"))


def step_of(
    splits: Splits,
    student: Student,
    teacher: nn.Module,
    *,
    rates: MetaRates | None = None,
    terms: tuple[TermConfig, ...] = LOGITS,
    **options: Any,
) -> MetaStep:
    given = MetaRates(0.1, 0.05) if rates is None else rates
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.0, momentum=0.9)
    return MetaStep(
        student, teacher, build_terms(terms), quiz_of(splits), lambda _batch: given, optimizer,
        tap_paths=student.tap_paths, **options,
    )  # fmt: skip


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_teaching_leaves_the_student_bit_for_bit(splits: Splits, order: Order, frozen: bool) -> None:
    student, teacher = nets(splits)
    freeze_batch_norm(student, frozen)
    step = step_of(splits, student, teacher, order=order)
    before, taught, numbers = copy_of(student), copy_of(teacher), torch.get_rng_state()
    found = step.gradient(batch_of(splits), 0.1)
    assert same(before, copy_of(student)) and same(taught, copy_of(teacher))
    assert torch.equal(numbers, torch.get_rng_state())
    assert all(parameter.grad is None for net in (student, teacher) for parameter in net.parameters())
    assert max(float(gradient.abs().max()) for gradient in found.gradients) > 0


def test_a_step_moves_the_weights_of_the_teacher_alone(splits: Splits) -> None:
    student, teacher = nets(splits)
    before = copy_of(teacher)
    result = step_of(splits, student, teacher)(batch_of(splits))
    after, weights = copy_of(teacher), dict(teacher.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before if name not in weights)
    assert all(not torch.equal(before[name], after[name]) for name in ("head.weight", "stem.0.weight"))
    assert all(weight.grad is None for weight in weights.values())
    assert "quiz_loss" in result.facts and not result.facts["quiz_loss"].requires_grad
    assert set(result.terms) == {"cross_entropy", "soft_target"} and result.loss.requires_grad


def test_the_pilot_learns_from_the_teacher_as_it_is_now(splits: Splits) -> None:
    student, teacher = nets(splits)
    twin, taught = copy.deepcopy(student), copy.deepcopy(teacher)
    torch.manual_seed(3)
    loss = step_of(splits, student, teacher, rates=MetaRates(0.1, 0.5))(batch_of(splits)).loss
    torch.manual_seed(3)
    gradients = step_of(splits, twin, taught).gradient(batch_of(splits), 0.1).gradients
    optimizer = torch.optim.SGD(taught.parameters(), lr=0.5, momentum=0.9)
    for parameter, gradient in zip(taught.parameters(), gradients, strict=True):
        parameter.grad = gradient
    plain = DistillStep(twin, taught, build_terms(LOGITS), tap_paths=twin.tap_paths)
    torch.manual_seed(3)
    untaught = plain(batch_of(splits)).loss
    optimizer.step()
    torch.manual_seed(3)
    assert torch.equal(loss, plain(batch_of(splits)).loss) and not torch.equal(loss, untaught)


def train(student: Student, step: Callable[[Batch], Any], splits: Splits, steps: int) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    for index in range(steps):
        torch.manual_seed(index)
        optimizer.zero_grad()
        step(batch_of(splits, step=index)).loss.backward()
        optimizer.step()
    return copy_of(student)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("teacher_lr", [0.0, None])
def test_without_teaching_it_is_plain_distillation_bit_for_bit(
    splits: Splits, order: Order, teacher_lr: float | None
) -> None:
    student, teacher = nets(splits)
    plain = train(student, DistillStep(student, teacher, build_terms(LOGITS)), splits, 4)
    student, teacher = nets(splits)
    before = copy_of(teacher)
    step = step_of(splits, student, teacher, rates=MetaRates(0.1, teacher_lr), order=order)
    assert same(train(student, step, splits, 4), plain)
    assert same(before, copy_of(teacher))
    student, teacher = nets(splits)
    taught = train(student, step_of(splits, student, teacher, order=order), splits, 4)
    assert not same(taught, plain)


def test_without_a_step_of_the_student_the_teacher_gets_nothing(splits: Splits) -> None:
    student, teacher = nets(splits)
    found = step_of(splits, student, teacher).gradient(batch_of(splits), 0.0)
    assert all(float(gradient.abs().max()) == 0.0 for gradient in found.gradients)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("order", ORDERS)
def test_low_bit_students_teach_finitely(splits: Splits, name: str, order: Order) -> None:
    student, teacher = nets(splits, QUANTIZERS[name])
    found = step_of(splits, student, teacher, order=order).gradient(batch_of(splits), 0.1)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found.gradients)
    assert max(float(gradient.abs().max()) for gradient in found.gradients) > 0


def test_both_orders_agree_on_a_fine_grid(splits: Splits) -> None:
    """At 8 bits the staircase that ``first`` sees is nearly the line that ``second`` takes it for."""
    student, teacher = nets(splits, QuantSpec(8, 8))
    second, first = (
        torch.cat([one.flatten() for one in step_of(splits, student, teacher, order=order)
                   .gradient(batch_of(splits), 0.1).gradients])
        for order in ORDERS
    )  # fmt: skip
    assert float(functional.cosine_similarity(second, first, dim=0)) > 0.9


def test_the_quiz_falls_along_the_gradient(splits: Splits) -> None:
    """Float student, so that nothing is estimated: the predicted change of the quiz loss is what happens."""
    student, teacher = nets(splits)
    with global_stream(0, "init"):
        net = TinyNet().train()
    step = MetaStep(
        net, teacher, build_terms(LOGITS), quiz_of(splits), lambda _: MetaRates(0.5, 0.0),
        torch.optim.SGD(teacher.parameters(), lr=0.0),
    )  # fmt: skip
    found = step.gradient(batch_of(splits), 0.5)
    slope = sum(float(gradient.square().sum()) for gradient in found.gradients)
    stride = 0.002 * float(found.quiz_loss) / slope
    with torch.no_grad():
        for parameter, gradient in zip(teacher.parameters(), found.gradients, strict=True):
            parameter.sub_(stride * gradient)
    after = step.gradient(batch_of(splits), 0.5).quiz_loss
    assert float(found.quiz_loss - after) == pytest.approx(stride * slope, rel=0.1)


def test_step_sizes_take_the_assumed_step_too(splits: Splits) -> None:
    student, teacher = nets(splits)
    whole = step_of(splits, student, teacher).gradient(batch_of(splits), 0.1)
    slowed = step_of(
        splits, student, teacher, scales=lambda: quantizer_scales(student), scale_lr_factor=0.1
    ).gradient(batch_of(splits), 0.1)  # fmt: skip
    for scale in quantizer_scales(student):
        scale.requires_grad_(False)
    without = step_of(splits, student, teacher).gradient(batch_of(splits), 0.1)
    losses = [float(found.quiz_loss) for found in (whole, slowed, without)]
    assert len(set(losses)) == 3
    assert all(
        not torch.equal(a, b) for a, b in zip(whole.gradients, without.gradients, strict=True) if float(a.abs().max())
    )


TERMS = {
    "class weights": (TermConfig(loss="class_relation"),),
    "features": (TermConfig(loss="similarity_preserving", weight=10.0, taps=(("left", "stem"),)), *LOGITS),
    "labels and confidence": (TermConfig(loss="teacher_confidence"), LOGITS[0]),
}


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_kind_of_term_reaches_the_teacher(splits: Splits, name: str, order: Order) -> None:
    student, teacher = nets(splits)
    step = step_of(splits, student, teacher, terms=TERMS[name], order=order)
    with step.tapped():
        found = step.gradient(batch_of(splits), 0.1)
        by_name = dict(zip(dict(teacher.named_parameters()), found.gradients, strict=True))
        assert float(by_name["head.weight"].abs().max()) > 0
        assert (float(by_name["stem.0.weight"].abs().max()) == 0) == (name == "class weights")
        step(batch_of(splits)).loss.backward()
    assert not any(module._forward_hooks for net in (student, teacher) for module in net.modules())


@pytest.mark.parametrize("image", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("order", ORDERS)
def test_extreme_images_stay_finite(splits: Splits, image: float, order: Order) -> None:
    student, teacher = nets(splits)
    batch = batch_of(splits, images=torch.full((16, 1, 8, 8), image))
    found = step_of(splits, student, teacher, order=order).gradient(batch, 0.1)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (*found.gradients, found.quiz_loss))


def test_a_gradient_that_is_not_finite_stops_before_the_teacher_moves(splits: Splits) -> None:
    student, teacher = nets(splits)
    before = copy_of(teacher)
    images = torch.full((16, 1, 8, 8), float("nan"))
    with pytest.raises(
        TrainingError, match="quiz gradient with respect to the teacher is not finite.*epoch 3, step 5.*inner_lr"
    ) as caught:
        step_of(splits, student, teacher)(batch_of(splits, images=images, epoch=2, step=4))
    assert (caught.value.term, caught.value.epoch, caught.value.step) == ("quiz", 3, 5)
    assert same(before, copy_of(teacher))


def test_terms_must_read_the_teacher(splits: Splits) -> None:
    student, teacher = nets(splits)
    with pytest.raises(ValueError, match="no loss term reads the teacher"):
        step_of(splits, student, teacher, terms=LOGITS[:1])


class _Interrupted(Exception):
    """Stands for a kill."""


def make_job(folder: Path, splits: Splits, *, stop: tuple[int, int] | None = None) -> Job:
    student, teacher = nets(splits)
    train = TrainConfig(epochs=3, lr=0.05, warmup_epochs=1, checkpoint_every_s=0)
    meta = MetaConfig(quiz_images=24, teacher_lr=0.05, teacher_start_epoch=1)
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    schedule = MetaSchedule(train, meta, steps_per_epoch=3)
    step = MetaStep(
        student, teacher, build_terms(LOGITS), quiz_of(splits), schedule, optimizer, tap_paths=student.tap_paths
    )

    def stopping(batch: Batch) -> Any:
        if (batch.epoch, batch.step) == stop:
            raise _Interrupted
        return step(batch)

    folder.mkdir(exist_ok=True)
    return Job(
        role="student",
        model=student,
        config=train,
        data=DataConfig(name="npz", path=Path("unused"), batch_size=16),
        splits=splits,
        agent=build_agent(AgentConfig(policy="crop", crop_padding=1), epochs=3, mean=splits.mean),
        phases=(Phase("meta", 3, stopping, hold=step.tapped),),
        seed=0,
        device=torch.device("cpu"),
        folder=folder,
        scales=lambda: quantizer_scales(student),
        others={"teacher": teacher},
        partners=(Partner("teacher", teacher, optimizer=optimizer),),
    )


def fitted(job: Job) -> tuple[dict[str, Tensor], dict[str, Tensor], list[dict[str, Any]]]:
    with torch.random.fork_rng():
        trainer = Trainer(job, Silent())
        trainer.start(lambda: None)
        rows = [dict(row) for row in trainer.run().rows]
    for row in rows:
        row.pop("seconds"), row.pop("images_per_second")
    return copy_of(job.model), copy_of(job.partners[0].module), rows


@pytest.mark.parametrize("stop", [(1, 2), (2, 1)])
def test_a_killed_training_goes_on_bit_for_bit(tmp_path: Path, splits: Splits, stop: tuple[int, int]) -> None:
    whole = fitted(make_job(tmp_path / "whole", splits))
    with pytest.raises(_Interrupted):
        fitted(make_job(tmp_path / "parts", splits, stop=stop))
    parts = fitted(make_job(tmp_path / "parts", splits))
    assert same(whole[0], parts[0]) and same(whole[1], parts[1]) and whole[2] == parts[2]
    assert ["quiz_loss" in row["facts"] for row in whole[2]] == [False, True, True]
    assert not same(whole[1], copy_of(nets(splits)[1]))


def test_the_quiz_is_drawn_by_step(splits: Splits) -> None:
    quiz = quiz_of(splits)
    first, again, next_one = quiz(0, 0), quiz(0, 0), quiz(0, 1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], next_one[0])
    assert first[0].shape == (16, 1, 8, 8) and len(first[0].flatten(1).unique(dim=0)) == 16
    assert splits.quiz is not None
    everything = Quiz(splits.quiz, batch_size=99, mean=splits.mean, std=splits.std, seed=0, device=torch.device("cpu"))
    assert len(everything(0, 0)[1]) == 24
    with pytest.raises(ValueError, match="0 images"):
        Quiz(splits.quiz.subset(torch.arange(0)), batch_size=4, mean=(0.5,), std=(0.5,), seed=0,
             device=torch.device("cpu"))  # fmt: skip
    with pytest.raises(ValueError, match="batch_size=0"):
        Quiz(splits.quiz, batch_size=0, mean=(0.5,), std=(0.5,), seed=0, device=torch.device("cpu"))
