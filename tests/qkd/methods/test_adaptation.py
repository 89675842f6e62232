"""Domain adaptation: which net each loss moves, when, from which images, and that no label of the target is read."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkd.agents import build_agent
from qkd.cli import main
from qkd.config import AdaptationConfig, AgentConfig, RunConfig
from qkd.data import DataError, Splits, load_splits
from qkd.files import read_safetensors
from qkd.losses import adapted_student_loss, adapting_teacher_loss, cross_entropy_loss, mean_discrepancy_loss
from qkd.methods.adaptation.source import PairedBatch, PairedSource
from qkd.methods.adaptation.step import AdaptationStep
from qkd.methods.phase_checks import student_faults
from qkd.methods.table import methods_of
from qkd.pipeline.dryrun import dry_run
from qkd.progress import Silent
from qkd.roles import images as run_images_module
from qkd.roles.nets import load_teacher
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.testing import run_tiny, tiny_config
from qkd.training import Job
from qkd.training.loop import Trainer
from qkd.training.source import ImageSource

pytestmark = pytest.mark.usefixtures("eager")
DOMAINS: dict[str, Any] = {
    "data.domains": {"upright": {}, "inverted": {"invert": True}},
    "data.unseen_domain": "inverted",
    "data.val_fraction": 0,
}
CHANGES: dict[str, Any] = {
    **DOMAINS,
    "student.net": "lenet5_half",
    "student.init": "float",
    "student.float_train": {"epochs": 1},
    "student.adaptation": {"teacher_tap": "flatten"},
}


def net(seed: int, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)).double()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SEEN, HIDDEN, LABELS = drawn(1, 6, 4), drawn(2, 6, 4) + 1, torch.tensor([0, 1, 2, 0, 1, 2])


def batch(epoch: int, step: int) -> PairedBatch:
    return PairedBatch(SEEN, LABELS, SEEN.byte(), epoch, step, target=HIDDEN)


def step_of(student: nn.Module, teacher: nn.Module, *, smoothing: float = 0.0, **settings: Any) -> AdaptationStep:
    config = AdaptationConfig(teacher_tap="1", **settings)
    return AdaptationStep(student, teacher, config, epochs=3, steps=2, label_smoothing=smoothing)


def gradients(of: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in of.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("epoch", "place", "b"), [(0, 0, 0.1), (2, 1, 0.9), (1, 0, 0.1 * 9**0.4)])
def test_the_loss_is_that_of_the_formula(epoch: int, place: int, b: float, smoothing: float) -> None:
    """L = (1 - b)(CE + g MMD) + b (a T^2 KL_s + (1 - a) CE_s + T^2 KL_t), T 20, a 0.3, b from 0.1 to 0.9."""
    student, teacher = net(0), net(1, 7)
    step = step_of(student, teacher, smoothing=smoothing)
    with step.tapped():
        result = step(batch(epoch, place))
    p = (2 * epoch + place) / 5
    g = 2 / (1 + math.exp(-10 * p)) - 1
    z, v = student(torch.cat([SEEN, HIDDEN])), teacher(torch.cat([SEEN, HIDDEN]))
    features = teacher[1](teacher[0](torch.cat([SEEN, HIDDEN])))

    def kl(rows: slice) -> float:
        ours, theirs = (torch.log_softmax(one[rows].detach() / 20, 1) for one in (z, v))
        return float((theirs.exp() * (theirs - ours)).sum(1).mean())

    apart = mean_discrepancy_loss(features[:6], features[6:]).item()
    taught = (1 - b) * (cross_entropy_loss(v[:6], LABELS, label_smoothing=smoothing).item() + g * apart)
    task = cross_entropy_loss(z[:6], LABELS, label_smoothing=smoothing).item()
    learned = b * (0.3 * 400 * kl(slice(6)) + 0.7 * task + 400 * kl(slice(6, 12)))
    assert result.loss.item() == pytest.approx(taught + learned, abs=1e-9)
    assert result.terms["adapting_teacher"].item() == pytest.approx(taught, abs=1e-9)
    assert result.terms["adapted_student"].item() == pytest.approx(learned, abs=1e-9)
    assert float(result.facts["student_share"]) == pytest.approx(b)
    assert float(result.facts["discrepancy_weight"]) == pytest.approx(g)
    assert torch.equal(result.logits, student(SEEN))


def test_each_net_is_moved_by_its_own_loss_alone() -> None:
    """As released the student's loss moves the teacher, too; here its gradient is that of its own loss, to the bit."""
    student, teacher = net(0), net(1, 7)
    step = step_of(student, teacher)
    with step.tapped():
        step(batch(1, 1)).loss.backward()
    own_teacher, own_student = copy.deepcopy(teacher), copy.deepcopy(student)
    for one in (own_teacher, own_student):
        one.zero_grad()
    both = torch.cat([SEEN, HIDDEN])
    v, z = own_teacher(both), own_student(both)
    features = own_teacher[1](own_teacher[0](both))
    apart = mean_discrepancy_loss(features[:6], features[6:])
    adapting_teacher_loss(v[:6], LABELS, apart, progress=0.6).backward()
    adapted_student_loss(z[:6], z[6:], v[:6].detach(), v[6:].detach(), LABELS, progress=0.6).backward()
    for net_, own in ((teacher, own_teacher), (student, own_student)):
        assert len(gradients(net_)) == 4
        for a, b in zip(gradients(net_), gradients(own), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-15)


def test_a_batch_without_a_target_is_refused() -> None:
    step = step_of(net(0), net(1))
    plain = PairedBatch(SEEN, LABELS, SEEN.byte(), 0, 0)
    with step.tapped(), pytest.raises(ValueError, match="no images of an unseen domain"):
        step(plain)


# the source


@pytest.fixture
def job(data: Path, tmp_path: Path) -> Job:
    config = tiny_config(data, CHANGES)
    splits = load_splits(config.data, seed=0)
    agent = build_agent(AgentConfig(policy="crop", crop_padding=1), epochs=3, mean=splits.mean)
    train = config.student.train
    return Job("student", nn.Linear(1, 1), train, config.data, splits, agent, (), 0, torch.device("cpu"), tmp_path)


def test_a_batch_has_as_many_images_of_each_domain(job: Job) -> None:
    source = PairedSource(job)
    found = list(source.batches(0, 0, 10))
    assert source.images == len(job.splits.train) == 32 and len(found) == 3
    plain = list(ImageSource(job).batches(0, 0, 10))
    for ours, theirs in zip(found, plain, strict=True):
        assert isinstance(ours, PairedBatch) and ours.target is not None
        assert ours.target.shape == ours.images.shape == (10, 1, 8, 8) and ours.target.dtype == torch.float32
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)


def test_batches_are_the_same_when_an_epoch_is_resumed(job: Job) -> None:
    source = PairedSource(job)
    whole = [one.target for epoch in range(3) for one in source.batches(epoch, 0, 10)]  # type: ignore[attr-defined]
    for epoch in range(3):
        resumed = [one.target for one in PairedSource(job).batches(epoch, 1, 10)]  # type: ignore[attr-defined]
        assert all(torch.equal(*pair) for pair in zip(resumed, whole[3 * epoch + 1 : 3 * epoch + 3], strict=True))


def test_images_of_the_target_are_gone_through_before_one_comes_again(job: Job) -> None:
    source, count = PairedSource(job), 32
    places = source._places(0, 4 * count)
    for lap in range(4):
        assert places[lap * count : (lap + 1) * count].sort().values.tolist() == list(range(count))
    assert not torch.equal(places[:count], places[count : 2 * count])
    assert torch.equal(source._places(50, 90), places[50:90])
    few = replace(job, splits=replace(job.splits, target=job.splits.target.subset(torch.arange(3))))  # type: ignore[union-attr]
    assert [len(one.target) for one in PairedSource(few).batches(0, 0, 10)] == [10, 10, 10]  # type: ignore[attr-defined]


def test_repeated_images_are_augmented_anew(job: Job) -> None:
    few = replace(job, splits=replace(job.splits, target=job.splits.target.subset(torch.arange(2))))  # type: ignore[union-attr]
    rows = torch.cat([one.target for one in PairedSource(few).batches(0, 0, 10)])  # type: ignore[attr-defined]
    assert len(rows.flatten(1).unique(dim=0)) > 6, "30 views of 2 images, cropped at 9 places each"


def test_a_set_without_domains_has_no_source(job: Job) -> None:
    with pytest.raises(ValueError, match=r"no images of an unseen domain; set data\.domains"):
        PairedSource(replace(job, splits=replace(job.splits, target=None)))


# runs


class Untouchable:
    """Stands for labels: raises whatever is done with it."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"a label of the unseen domain was read ({name})")

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a label of the unseen domain was read")


def hide_labels(splits: Splits) -> Splits:
    """Replace the labels that the unlabeled part holds inside by an object that raises, in every form they have."""
    inner = splits.target._split  # type: ignore[union-attr]

    class Hidden:
        decodes, labels = inner.decodes, Untouchable()
        image_shape = inner.image_shape

        def __len__(self) -> int:
            return len(inner)

        def batch(self, indices: Tensor, device: Any) -> tuple[Tensor, Any]:
            return inner.batch(indices, device)[0], Untouchable()

        def to(self, device: Any) -> Hidden:
            inner.to(device)
            return self

    splits.target._split = Hidden()  # type: ignore[union-attr,assignment]
    return splits


@pytest.fixture(scope="module")
def done(eager: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:  # noqa: ARG001
    patch = pytest.MonkeyPatch()
    load = run_images_module.load_splits
    patch.setattr(run_images_module, "load_splits", lambda *args, **kwargs: hide_labels(load(*args, **kwargs)))
    run = run_tiny(tiny_config(data, CHANGES), tmp_path_factory.mktemp("runs"), "teacher", "search", "distill")
    patch.undo()
    return run


def weights(run: Path, role: str) -> dict[str, Tensor]:
    return read_safetensors(run / role / "weights.safetensors")


def test_a_run_reads_no_label_of_the_target_and_is_the_run_that_could(
    done: RunFolder, data: Path, tmp_path: Path
) -> None:
    with run_tiny(tiny_config(data, CHANGES), tmp_path, "teacher", "search", "distill") as plain:
        for role in ("teacher", "student", "student/float", "student/teacher"):
            ours, theirs = weights(done.path, role), weights(plain.path, role)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_teacher_adapts_in_both_trainings_and_is_kept_from_the_last(done: RunFolder) -> None:
    before, after = weights(done.path, "teacher"), weights(done.path, "student/teacher")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(value, before[name]) for name, value in load_teacher(done).state_dict().items())
    rows = [json.loads(line) for line in (done.path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert {"adapting_teacher", "adapted_student"} == set(rows[0]["terms"])
    shares = [row["facts"]["student_share"] for row in rows]
    assert 0.1 < shares[0] < shares[1] < 0.9
    assert not (done.path / "student" / "float" / "teacher").exists()
    assert not done.why_incomplete("student_float"), "its files are its own"


def test_a_killed_run_resumes_to_the_bit(
    done: RunFolder, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = Trainer._step, 0

    def counting(self: Trainer, *arguments: Any) -> Any:
        nonlocal count
        if self.job.role != "student":
            return step(self, *arguments)
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        self.saved_at = -math.inf
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", counting)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tiny_config(data, CHANGES), tmp_path, "teacher", "search", "distill")
    monkeypatch.undo()
    run = RunFolder(tiny_config(data, CHANGES), tmp_path / "tiny")
    STAGES["distill"](run, Silent())
    for role in ("student", "student/teacher"):
        ours, theirs = weights(run.path, role), weights(done.path, role)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_dry_run_takes_its_steps_and_leaves_nothing_in_the_file(data: Path) -> None:
    report = dry_run(tiny_config(data, CHANGES), Silent())
    assert any("phase" in check.name for check in report.checks)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data.domains": None, "data.unseen_domain": None}, r"data\.domains: missing"),
        ({"teacher.members": 2}, r"teacher\.members: must be 1"),
        ({"student.terms": [{"loss": "cross_entropy"}]}, r"student\.terms: .* brings its own loss"),
        ({"student.view": "clean"}, r"student\.view: must be `same`"),
        ({"student.agent": {"policy": "cutmix"}}, "CutMix mixes labels"),
        ({"student.peers": {"nets": [{}]}}, r"student\.peers: cannot be combined with student\.adaptation"),
        ({"student.data_free": {"method": "noise"}}, r"student\.data_free: cannot be combined"),
        (
            {"student.phases": [{"epochs": 2, "terms": [{"loss": "cross_entropy"}]}]},
            "every phase has its own `terms`",
        ),
        ({"student.phases": [{"epochs": 2, "meta": {"quiz_images": 4}}]}, "meta and teacher_terms cannot be combined"),
    ],
)
def test_what_it_cannot_be_used_with(data: Path, changes: dict[str, Any], match: str) -> None:
    config = tiny_config(data, {**CHANGES, **changes})
    with pytest.raises(ValueError, match=match):
        methods_of(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.domains=null", "data.unseen_domain=null"], "config.data.domains: missing; student.adaptation needs"),
        (["teacher.members=2"], "config.teacher.members: must be 1 with student.adaptation, got 2"),
        (
            ["student.agent={policy: teacher}", "teacher.agent={policy: cutmix}"],
            "config.student.agent: `policy: teacher` is cutmix, which mixes labels",
        ),
    ],
)
def test_validate_says_so(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "digits/domains/adaptation", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("trains", "modules"), ("combine", "clipped")])
def test_what_a_phase_of_it_cannot_say(data: Path, key: str, value: str) -> None:
    config: RunConfig = tiny_config(data, {**CHANGES, "student.phases": [{"epochs": 2, key: value}]})
    assert any(f"phases[0].{key}" in fault for fault in student_faults(config.student, config.student.phases))


def test_several_devices_cannot_share_its_batches(data: Path) -> None:
    (method, *_) = [one for one in methods_of(tiny_config(data, CHANGES)) if one.trains_teacher]
    assert "compares all images" in method.why_one_device
    with pytest.raises(DataError):
        _ = load_splits(tiny_config(data, CHANGES).data, seed=0).target.labels  # type: ignore[union-attr]


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nets_that_end_in_softmax_are_refused(who: str) -> None:
    nets = {one: nn.Sequential(net(seed), nn.Softmax(1) if one == who else nn.Identity())
            for seed, one in enumerate(("student", "teacher"))}  # fmt: skip
    step = AdaptationStep(nets["student"], nets["teacher"], AdaptationConfig(teacher_tap="0.1"), epochs=1, steps=2)
    images = drawn(0, 6, 4)
    batch = PairedBatch(images, torch.arange(6) % 3, images, 0, 0, target=drawn(1, 6, 4))
    with step.tapped(), pytest.raises(ValueError, match=f"the {who} returns probabilities"):
        step(batch)
