"""The loop: it learns, resumes bit for bit from any step, and stops on values that are not finite."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkd.agents import build_agent
from qkd.config import AgentConfig, DataConfig, TrainConfig
from qkd.data import Splits
from qkd.progress import Silent
from qkd.seeding import global_stream
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch, FitResult, Job, Phase, StepResult, TrainingError, fit, supervised_step
from qkd.training.loop import Trainer

DATA = DataConfig(name="npz", path=Path("unused"), batch_size=16, eval_batch_size=20)
CPU = torch.device("cpu")


class Interrupted(Exception):
    """Stands for a kill: nothing of the process survives but the folder."""


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def splits() -> Splits:
    return synthetic_splits(train=72, val=18)  # 4 full batches, and 8 images that are left over


def make_job(folder: Path, splits: Splits, net: nn.Module | None = None, **changes: Any) -> Job:
    if net is None:
        with global_stream(0, "init"):
            net = TinyNet(dropout=0.2)
    settings = {"epochs": 3, "lr": 0.1, "checkpoint_every_s": 0, **changes.pop("train", {})}
    config = TrainConfig.model_validate(settings)
    agent = AgentConfig(policy="crop_flip", crop_padding=1)
    phases = (Phase("supervised", config.epochs, supervised_step(net, label_smoothing=config.label_smoothing)),)
    folder.mkdir(parents=True, exist_ok=True)
    return Job(
        **{
            "role": "teacher",
            "model": net,
            "config": config,
            "data": DATA,
            "splits": splits,
            "agent": build_agent(agent, epochs=config.epochs, mean=splits.mean),
            "phases": phases,
            "seed": 0,
            "device": CPU,
            "folder": folder,
            **changes,
        }
    )


def state(job: Job) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in job.model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steady(rows: Any) -> list[dict[str, Any]]:
    """Return metrics without what a clock measured."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def stopping(step: Callable[[Batch], StepResult], at: tuple[int, int]) -> Callable[[Batch], StepResult]:
    def stopped(batch: Batch) -> StepResult:
        if (batch.epoch, batch.step) == at:
            raise Interrupted
        return step(batch)

    return stopped


def interrupted(folder: Path, splits: Splits, at: tuple[int, int], **changes: Any) -> None:
    job = make_job(folder, splits, **changes)
    phase = Phase("supervised", job.config.epochs, stopping(job.phases[0].step, at))
    job = make_job(folder, splits, job.model, phases=(phase,), **changes)
    with pytest.raises(Interrupted):
        fit(job, Silent())


def test_it_learns(tmp_path: Path, splits: Splits) -> None:
    job = make_job(tmp_path, splits, TinyNet(), train={"epochs": 15})
    result = fit(job, Silent())
    assert result.rows[-1]["train_loss"] < 0.5 < result.rows[0]["train_loss"]
    assert result.rows[-1]["val_accuracy"] > 0.8
    assert result.epochs == 15 and result.images_per_second == pytest.approx(15 * 64 / result.seconds)


def test_metrics_are_told_line_by_line(tmp_path: Path, splits: Splits) -> None:
    result = fit(make_job(tmp_path, splits), Silent())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(result.rows) and [row["epoch"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == {
        "epoch", "phase", "lr", "train_loss", "train_accuracy", "val_accuracy", "terms", "seconds", "images_per_second"
    }  # fmt: skip
    assert rows[0]["phase"] == "supervised" and rows[0]["terms"] == {"cross_entropy": rows[0]["train_loss"]}
    assert 0 <= rows[0]["train_accuracy"] <= 1 and rows[0]["images_per_second"] > 0


def test_runs_are_equal_whatever_the_global_generator_holds(tmp_path: Path, splits: Splits) -> None:
    first, second = make_job(tmp_path / "a", splits), make_job(tmp_path / "b", splits)
    fit(first, Silent())
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    fit(second, Silent())
    assert equal(state(first), state(second))
    assert torch.equal(torch.get_rng_state(), before)


VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "adamw and averaged weights": {"optimizer": "adamw", "lr": 0.01, "ema_decay": 0.9, "label_smoothing": 0.1},
    "channels last, clipped, warm-up": {"memory_format": "channels_last", "clip_grad_norm": 0.5, "warmup_epochs": 1},
    "bf16": {"precision": "bf16"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_equals_no_interruption(tmp_path: Path, splits: Splits, variant: str) -> None:
    train = VARIANTS[variant]
    whole = make_job(tmp_path / "whole", splits, train=train)
    expected = fit(whole, Silent())
    for at in ((0, 0), (0, 2), (1, 0), (2, 3)):  # the same folder: interrupted four times
        interrupted(tmp_path / "cut", splits, at, train=train)
    resumed = make_job(tmp_path / "cut", splits, train=train)
    found = fit(resumed, Silent())
    assert equal(state(resumed), state(whole))
    assert steady(found.rows) == steady(expected.rows)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert steady(map(json.loads, lines)) == steady(expected.rows)


def test_resuming_between_checkpoints_equals_no_interruption(tmp_path: Path, splits: Splits) -> None:
    rare = {"checkpoint_every_s": 1e6}  # at epochs' ends only
    whole = make_job(tmp_path / "whole", splits, train=rare)
    fit(whole, Silent())
    interrupted(tmp_path / "cut", splits, (1, 2), train=rare)
    assert len((tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()) == 1
    resumed = make_job(tmp_path / "cut", splits, train=rare)
    fit(resumed, Silent())
    assert equal(state(resumed), state(whole))


@pytest.mark.parametrize("policy", ["crop_flip", "cutmix"])
def test_resuming_after_the_last_step_of_an_epoch_equals_no_interruption(
    tmp_path: Path, splits: Splits, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    agent = build_agent(AgentConfig(policy=policy, crop_padding=1), epochs=3, mean=splits.mean)
    whole = make_job(tmp_path / "whole", splits, agent=agent)
    fit(whole, Silent())

    def stop(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "score", stop)  # the last step is done and saved, the epoch is not
        fit(make_job(tmp_path / "cut", splits, agent=agent), Silent())
    resumed = make_job(tmp_path / "cut", splits, agent=agent)
    fit(resumed, Silent())
    assert equal(state(resumed), state(whole))


def test_a_finished_training_is_only_read(tmp_path: Path, splits: Splits) -> None:
    first = make_job(tmp_path, splits, train={"ema_decay": 0.9})
    rows = fit(first, Silent()).rows
    again = make_job(tmp_path, splits, train={"ema_decay": 0.9})
    assert fit(again, Silent()).rows == rows
    assert equal(state(again), state(first))


def test_an_altered_checkpoint_costs_one_step(tmp_path: Path, splits: Splits) -> None:
    whole = make_job(tmp_path / "whole", splits)
    fit(whole, Silent())
    interrupted(tmp_path / "cut", splits, (1, 2))
    last = sorted((tmp_path / "cut" / "checkpoint").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    warned: list[str] = []
    progress = Silent()
    progress.warn = warned.append  # type: ignore[method-assign]
    resumed = make_job(tmp_path / "cut", splits)
    fit(resumed, progress)
    assert equal(state(resumed), state(whole))
    assert len(warned) == 1 and str(last) in warned[0]


def test_a_checkpoint_made_from_something_else_is_refused(tmp_path: Path, splits: Splits) -> None:
    fit(make_job(tmp_path, splits, fingerprint={"data": "a", "teacher": "x"}), Silent())
    with pytest.raises(ValueError, match=r"other inputs \(teacher changed.*delete"):
        fit(make_job(tmp_path, splits, fingerprint={"data": "a", "teacher": "y"}), Silent())


def test_a_checkpoint_of_another_net_is_refused(tmp_path: Path, splits: Splits) -> None:
    fit(make_job(tmp_path, splits), Silent())
    with pytest.raises(ValueError, match="not for this net.*of another shape"):
        fit(make_job(tmp_path, splits, TinyNet(width=8)), Silent())


def test_phases_follow_each_other(tmp_path: Path, splits: Splits) -> None:
    net = TinyNet()
    entered: list[str] = []

    def phase(name: str, epochs: int) -> Phase:
        def enter() -> None:
            assert net.training
            entered.append(name)

        return Phase(name, epochs, supervised_step(net), enter)

    result = fit(make_job(tmp_path, splits, net, phases=(phase("one", 1), phase("two", 2))), Silent())
    assert entered == ["one", "two", "two"] and [row["phase"] for row in result.rows] == entered
    with pytest.raises(ValueError, match="do not add up"):
        fit(make_job(tmp_path / "b", splits, net, phases=(phase("one", 1),)), Silent())


def test_averaged_weights_are_kept_and_scored(tmp_path: Path, splits: Splits) -> None:
    plain = make_job(tmp_path / "plain", splits)
    averaged = make_job(tmp_path / "averaged", splits, train={"ema_decay": 0.99})
    plain_rows = fit(plain, Silent()).rows
    rows = fit(averaged, Silent()).rows
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in plain_rows]  # training is the same
    assert not equal(state(plain), state(averaged))


def test_no_validation_images_is_no_accuracy(tmp_path: Path) -> None:
    result = fit(make_job(tmp_path, synthetic_splits(val=0)), Silent())
    assert [row["val_accuracy"] for row in result.rows] == [None] * 3


def test_fewer_images_than_a_batch_make_one_step(tmp_path: Path) -> None:
    result = fit(make_job(tmp_path, synthetic_splits(train=10)), Silent())
    assert result.images_per_second == pytest.approx(3 * 10 / result.seconds)


def test_no_images_is_an_error(tmp_path: Path) -> None:
    splits = synthetic_splits(train=8)
    splits.train = splits.train.subset(torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="training set is empty"):
        fit(make_job(tmp_path, splits), Silent())


# --- values that are not finite


def test_a_broken_weight_stops_with_the_layer(tmp_path: Path, splits: Splits) -> None:
    job = make_job(tmp_path, splits)
    step = job.phases[0].step

    def breaking(batch: Batch) -> StepResult:
        if (batch.epoch, batch.step) == (1, 2):
            job.model.left[0].weight.data[0, 0, 0, 0] = float("nan")
        return step(batch)

    job = make_job(tmp_path, splits, job.model, phases=(Phase("supervised", 3, breaking),))
    with pytest.raises(TrainingError) as caught:
        fit(job, Silent())
    error = caught.value
    assert (error.epoch, error.step, error.term) == (2, 3, "cross_entropy")
    assert error.layer == "teacher.left.0 (Conv2d)"
    for fact in ("epoch 2, step 3 of 4", "loss nan", "non-finite weights: left.0.weight", "lower train.lr"):
        assert fact in str(error)
    assert sorted((tmp_path / "checkpoint").glob("*.json"))[-1].name == "step-000000007.json"  # before the step
    repaired = make_job(tmp_path, splits)
    fit(repaired, Silent())
    assert all(bool(tensor.isfinite().all()) for tensor in state(repaired).values())


def test_a_broken_term_is_named(tmp_path: Path, splits: Splits) -> None:
    net = TinyNet()

    def step(batch: Batch) -> StepResult:
        logits = net(batch.images)
        good, bad = logits.square().mean(), (logits.mean() - logits.mean()) / 0
        return StepResult(good + bad, {"good": good, "bad": bad}, logits)

    with pytest.raises(TrainingError, match="term bad nan") as caught:
        fit(make_job(tmp_path, splits, net, phases=(Phase("p", 3, step),)), Silent())
    assert (caught.value.term, caught.value.layer, caught.value.epoch, caught.value.step) == ("bad", "", 1, 1)


def test_a_weight_that_overflows_a_finite_term_is_named(tmp_path: Path, splits: Splits) -> None:
    net = TinyNet()
    supervised = supervised_step(net)

    def step(batch: Batch) -> StepResult:
        made = supervised(batch)
        far = (made.logits * 1e5).sum()
        return replace(made, loss=made.loss + 1e36 * far, terms={**made.terms, "far": far})

    job = make_job(tmp_path, splits, net)
    job = replace(job, phases=(replace(job.phases[0], step=step),))
    with pytest.raises(TrainingError, match="finite on their own.*the weight of far, a loss scale.*first at") as caught:
        fit(job, Silent())
    assert caught.value.term == "far" and caught.value.layer


def test_a_broken_gradient_under_a_finite_loss_is_named(tmp_path: Path, splits: Splits) -> None:
    net = TinyNet()

    def step(batch: Batch) -> StepResult:
        logits = net(batch.images)
        fine = logits.square().mean()
        edge = (logits * 0).sum().sqrt()  # 0, with the gradient 0 * inf
        return StepResult(fine + edge, {"fine": fine, "edge": edge}, logits)

    before = {name: tensor.clone() for name, tensor in net.named_parameters()}
    with pytest.raises(TrainingError, match="non-finite gradient of term edge, first at head.bias") as caught:
        fit(make_job(tmp_path, splits, net, phases=(Phase("p", 3, step),)), Silent())
    assert (caught.value.term, caught.value.layer) == ("edge", "head.bias")
    assert all(torch.equal(before[name], parameter) for name, parameter in net.named_parameters())


def test_a_fixed_net_beside_it_is_watched(tmp_path: Path, splits: Splits) -> None:
    net, teacher = TinyNet(), TinyNet().requires_grad_(False).eval()
    teacher.head.bias[1] = float("inf")

    def step(batch: Batch) -> StepResult:
        logits = net(batch.images)
        loss = (logits - teacher(batch.images)).square().mean()
        return StepResult(loss, {"match": loss}, logits)

    job = make_job(tmp_path, splits, net, role="student", phases=(Phase("p", 3, step),), others={"teacher": teacher})
    with pytest.raises(TrainingError) as caught:
        fit(job, Silent())
    assert caught.value.layer == "teacher.head (Linear)" and caught.value.term == "match"


def test_a_runaway_learning_rate_never_writes_a_broken_checkpoint(tmp_path: Path, splits: Splits) -> None:
    with pytest.raises(TrainingError, match=r"lower train\.lr"):
        fit(make_job(tmp_path, splits, TinyNet(), train={"lr": 1e6}), Silent())
    for path in (tmp_path / "checkpoint").glob("*.safetensors"):
        from qkd.files import read_safetensors

        weights = {name: t for name, t in read_safetensors(path).items() if name.startswith("model/")}
        assert weights and all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_fp16_on_a_cpu_is_float32_with_a_warning(tmp_path: Path, splits: Splits) -> None:
    warned: list[str] = []
    progress = Silent()
    progress.warn = warned.append  # type: ignore[method-assign]
    plain, asked = make_job(tmp_path / "a", splits), make_job(tmp_path / "b", splits, train={"precision": "fp16"})
    fit(plain, Silent())
    fit(asked, progress)
    assert equal(state(plain), state(asked)) and len(warned) == 1 and "float32" in warned[0]


def test_the_result_is_typed(tmp_path: Path, splits: Splits) -> None:
    assert isinstance(fit(make_job(tmp_path, splits), Silent()), FitResult)


@pytest.mark.parametrize("policy", ["crop_flip", "cutmix"])
def test_an_image_is_augmented_alike_in_batches_of_any_size(tmp_path: Path, splits: Splits, policy: str) -> None:
    agent = build_agent(AgentConfig(policy=policy, crop_padding=1), epochs=3, mean=splits.mean)

    def seen(batch_size: int) -> dict[tuple[int, int], Tensor]:
        found: dict[tuple[int, int], Tensor] = {}

        def record(batch: Batch) -> StepResult:
            assert batch.samples is not None
            assert torch.equal(batch.raw, splits.train.batch(batch.samples, CPU)[0])
            shown = batch.images.flatten(1)
            if policy == "cutmix":  # the second label and its share are the image's, too
                assert batch.mixed is not None and len(batch.mixed.labels) == len(batch.labels) == batch_size
                shown = torch.cat([shown, batch.mixed.labels[:, None], batch.mixed.share[:, None]], 1)
            found.update({(batch.epoch, int(sample)): row for sample, row in zip(batch.samples, shown, strict=True)})
            return supervised_step(job.model)(batch)

        data = DATA.model_copy(update={"batch_size": batch_size})
        job = make_job(tmp_path / str(batch_size), splits, data=data, agent=agent)
        fit(Job(**{**vars(job), "phases": (Phase("record", 3, record),)}), Silent())
        return found

    eight, whole = seen(8), seen(72)
    assert eight.keys() == whole.keys() and len(whole) == 3 * 72
    assert all(torch.equal(eight[key], whole[key]) for key in whole)
    assert any(not torch.equal(whole[0, sample], whole[1, sample]) for sample in range(72))
