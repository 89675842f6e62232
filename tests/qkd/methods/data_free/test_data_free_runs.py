"""Data-free runs: no real image before the student is trained, one generator for all widths, resume to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qkd.config import RunConfig
from qkd.config.data_free import FAMILIES
from qkd.data import Splits
from qkd.files import read_safetensors, sha256_of
from qkd.methods.data_free import method as method_module
from qkd.methods.data_free.inverting import inversions, pooling
from qkd.methods.data_free.making import generating
from qkd.methods.data_free.making.adversary import Adversary
from qkd.methods.data_free.making.blind import NoImages, RealImageError, blind
from qkd.methods.data_free.making.kinds import KINDS
from qkd.progress import Silent
from qkd.roles import learner
from qkd.run.folder import RunFolder
from qkd.stages import STAGES
from qkd.stages import student as stage
from qkd.testing import synthetic_splits
from qkd.training import loop

pytestmark = pytest.mark.usefixtures("eager")
FAST = ("noise", "procedural", "rdskd", "deep_inversion", "dfad", "dafl_joint", "adaptive_inversion")  # one a family
METHODS = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]
Begin = Callable[[RunConfig], RunFolder]


class Forbidden:
    """A part of a data set that raises when images are read, until one of some files is there."""

    decodes = False

    def __init__(self, part: Any, *until: Path) -> None:
        self.part, self.until, self.labels, self.read = part, until, part.labels, 0

    def __len__(self) -> int:
        return len(self.part)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.part.image_shape

    def batch(self, indices: Tensor, device: Any) -> tuple[Tensor, Tensor]:
        if not any(path.exists() for path in self.until):
            raise AssertionError("a real image was read")
        self.read += len(indices)
        return self.part.batch(indices, device)

    def subset(self, indices: Tensor) -> Any:
        raise AssertionError("real images were chosen")

    def to(self, device: Any) -> Any:  # noqa: ARG002
        return self


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replace the images of the distill stage by parts that raise, and keep the teacher and the marks of a student."""
    seen: dict[str, Any] = {}
    real_images, real_guide, real_marks = stage.run_images, learner.load_guide, learner.StudentRole.marks

    def images(run: RunFolder, progress: Any) -> Splits:
        splits = real_images(run, progress)
        trained = [run.path / "student" / name / "weights.safetensors" for name in ("", "float")]
        splits.train, splits.val = Forbidden(splits.train), Forbidden(splits.val)
        splits.test = seen["test"] = Forbidden(splits.test, *trained)
        return splits

    def guide(run: RunFolder) -> nn.Module:
        seen["teacher"] = real_guide(run)
        return seen["teacher"]

    def marks(role: learner.StudentRole) -> dict[str, str]:
        seen["marks"] = real_marks(role)
        return seen["marks"]

    monkeypatch.setattr(stage, "run_images", images)
    monkeypatch.setattr(learner, "load_guide", guide)
    monkeypatch.setattr(learner.StudentRole, "marks", marks)
    return seen


def distill(run: RunFolder) -> dict[str, Tensor]:
    STAGES["distill"](run, Silent())
    assert run.why_incomplete("distill") == ""
    return read_safetensors(run.path / "student" / "weights.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_no_real_image_is_read_and_the_teacher_stays_as_it_is(
    method: str, config_of: Callable[..., RunConfig], borrowed: Begin, watched: dict[str, Any]
) -> None:
    """Only the trained student is scored on real test images, each once."""
    config = config_of(method)
    with borrowed(config) as run:
        distill(run)
        teacher = read_safetensors(run.path / "teacher" / "weights.safetensors")
        for name, tensor in watched["teacher"].state_dict().items():
            assert torch.equal(tensor, teacher[name]), name
        assert all(parameter.grad is None for parameter in watched["teacher"].parameters())
        assert watched["test"].read == len(watched["test"])
        lines = (run.path / "student" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["val_accuracy"] for line in lines] == [None, None]
        made_once = FAMILIES[method] in ("generator", "pool")
        assert run.is_complete("generator") == made_once
        if made_once:
            found = json.loads((run.path / "generator" / "result.json").read_text())
            assert sum(found["class_histogram"]) == found["images"] and 0 <= found["histogram_entropy"] <= 1
        pattern = "weights.safetensors" if FAMILIES[method] == "generator" else "pool/batch_*.npz"
        sources = sorted((run.path / "generator").glob(pattern)) if made_once else []
        assert len(sources) == {"generator": 1, "pool": 2}.get(FAMILIES[method], 0)
        marks = {path.relative_to(run.path).as_posix(): sha256_of(path) for path in sources}
        assert marks.items() <= watched["marks"].items(), "a checkpoint is of these images"
        for path in sources:
            whole = path.read_bytes()
            path.write_bytes(whole + b"?")
            assert not run.is_complete("distill"), "a student of other images is trained again"
            path.write_bytes(whole)
        assert run.is_complete("distill")


@pytest.mark.parametrize("method", ["rdskd", "deep_inversion"])
def test_one_generator_serves_all_widths(
    method: str, config_of: Callable[..., RunConfig], borrowed: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second student takes the files of the first one's run: no step of a generator, no inversion."""
    steps = []
    real_step, real_batch = generating.GeneratorStep.__call__, pooling.PoolRole._write
    monkeypatch.setattr(generating.GeneratorStep, "__call__", lambda *of: [steps.append(1), real_step(*of)][1])
    monkeypatch.setattr(pooling.PoolRole, "_write", lambda *of: [steps.append(1), real_batch(*of)][1])
    with borrowed(config_of(method)) as run:
        first = distill(run)
        made = sha256_of(next((run.path / "generator").rglob("*0.npz" if method != "rdskd" else "weights.*")))
        assert len(steps) == (6 if method == "rdskd" else 2)
        source = run.path
    steps.clear()
    widths = {"name": "w2", "student.quant.weight_bits": 2, "student.quant.act_bits": 2, "teacher.run": str(source)}
    with borrowed(config_of(method, widths)) as run:
        second = distill(run)
        assert steps == []
        again = sha256_of(next((run.path / "generator").rglob("*0.npz" if method != "rdskd" else "weights.*")))
        assert made == again
    assert any(not torch.equal(first[name], second[name]) for name in first if first[name].shape == second[name].shape)
    another = {"latent": 9} if method == "rdskd" else {"weights": {"variation_weight": 1e-4}}
    with borrowed(config_of(method, {**widths, "name": "other"}, **another)) as run:
        distill(run)
        assert steps != [], "another generator is asked for"


def test_a_training_reads_its_pool_once(
    config_of: Callable[..., RunConfig], borrowed: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    monkeypatch.setattr(method_module, "load_pool", lambda files: [read.append(1), pooling.load_pool(files)][1])
    with borrowed(config_of("deep_inversion")) as run:
        distill(run)
        trained = [name for name in ("student", "student/float") if (run.path / name / "result.json").is_file()]
    assert len(read) == len(trained) >= 1


class Killed(BaseException):
    """What a test ends a run with."""


def kill_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    real, left = getattr(owner, name), [calls]

    def call(*given: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(*given, **more)

    monkeypatch.setattr(owner, name, call)


def student_of(config: RunConfig, borrowed: Begin, name: str) -> dict[str, Tensor]:
    with borrowed(config.model_copy(update={"name": name})) as run:
        return distill(run)


@pytest.mark.parametrize(
    ("method", "owner", "name", "calls"),
    [
        ("procedural", loop.Trainer, "_step", 3),
        ("rdskd", generating.GeneratorStep, "__call__", 4),  # in the generator's second epoch
        ("cmi", pooling.PoolRole, "_write", 1),  # between two batches of the pool
        ("dfad", loop.Trainer, "_step", 3),  # between a generator's step and the next
        ("dafl_joint", loop.Trainer, "_step", 3),
        ("adaptive_inversion", learner.StudentRole, "reestimate", 0),  # at the border of two phases, from the pool
        ("fast_dfkd", loop.Trainer, "_step", 2),  # a batch of the pool is made, the student's step is not
        pytest.param("cmi_adversarial", loop.Trainer, "_step", 3, marks=pytest.mark.slow),
        pytest.param("adaptive_inversion", loop.Trainer, "_step", 3, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    method: str, owner: Any, name: str, calls: int, config_of: Callable[..., RunConfig], borrowed: Begin
) -> None:
    changes: dict[str, Any] = {"student.train.checkpoint_every_s": 0}
    settings: dict[str, Any] = {}
    if name == "reestimate":
        changes |= {
            "student.low_bit": {"reestimate_batches": 2},
            "student.phases": [{"epochs": 1}, {"epochs": 1, "freeze_batch_norm": True}],
        }
    if method == "procedural":
        settings = {"boxed": 0.5, "procedural_kinds": ["windows", "strokes"]}
    if method == "dfad":
        settings = {"boxed": 0.5, "procedural_share": 0.5}
    if method == "dafl_joint":
        settings = {"warmup_steps": 2}
    if method == "rdskd":
        settings["train"] = {"epochs": 2, "optimizer": "adamw", "lr": 1e-3, "checkpoint_every_s": 0}
    config = config_of(method, changes, **settings)
    whole = student_of(config, borrowed, "whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, owner, name, calls)
        with pytest.raises(Killed), borrowed(config.model_copy(update={"name": "killed"})) as run:
            distill(run)
    resumed = student_of(config, borrowed, "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_lost_batch_of_a_pool_is_made_again_bit_for_bit(config_of: Callable[..., RunConfig], borrowed: Begin) -> None:
    """So that a student that is half trained on it can resume."""
    config = config_of("cmi", {"student.train.checkpoint_every_s": 0})
    whole = student_of(config, borrowed, "whole")
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, loop.Trainer, "_step", 2)
        with pytest.raises(Killed), borrowed(config.model_copy(update={"name": "killed"})) as run:
            distill(run)
    batch = run.path / "generator" / "pool" / "batch_00001.npz"
    before = batch.read_bytes()
    batch.unlink()
    resumed = student_of(config, borrowed, "killed")
    assert batch.read_bytes() == before
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_generator_warms_up_before_the_student_is_calibrated(
    config_of: Callable[..., RunConfig], borrowed: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float student, too, has a generator that is warm when its training begins."""
    order: list[str] = []
    warm_up, calibrate = Adversary.warm_up, learner.calibrate

    def warmed(own: Adversary, count: int, seed: int, role: str, progress: Any) -> None:
        order.append(role)
        warm_up(own, count, seed, role, progress)

    def calibrated(*given: Any, **more: Any) -> None:
        order.append("calibration")
        calibrate(*given, **more)

    monkeypatch.setattr(Adversary, "warm_up", warmed)
    monkeypatch.setattr(learner, "calibrate", calibrated)
    changes = {
        "student.init": "float",
        "student.float_train": {"epochs": 1, "optimizer": "adamw", "lr": 1e-3},
        "student.train": {"epochs": 1, "lr": 0.01},
    }
    with borrowed(config_of("dafl_joint", changes, warmup_steps=2)) as run:
        distill(run)
    assert order == ["student_float", "student", "calibration"]


def test_a_float_student_comes_first_where_the_nets_differ(
    config_of: Callable[..., RunConfig], borrowed: Begin, watched: dict[str, Any]
) -> None:
    """It learns from the same images, and is the twin of the report."""
    changes = {
        "student.init": "float",
        "student.float_train": {"epochs": 1, "optimizer": "adamw", "lr": 1e-3},
        "student.train": {"epochs": 1, "lr": 0.01},
    }
    with borrowed(config_of("rdskd", changes)) as run:
        distill(run)
        twin = json.loads((run.path / "student" / "float" / "result.json").read_text())
        assert twin["weight_bits"] is None and twin["net"] == "lenet5_half"
        assert run.is_complete("student_float") and run.is_complete("generator")
    assert watched["test"].read == 2 * len(watched["test"])


def test_frozen_statistics_are_the_teachers(config_of: Callable[..., RunConfig], borrowed: Begin) -> None:
    """With ``bn: frozen_teacher`` neither calibration nor training moves them."""
    changes = {"student.bn": "frozen_teacher", "student.net": None, "student.init": "auto"}
    with borrowed(config_of("noise", changes)) as run:
        student = distill(run)
        teacher = read_safetensors(run.path / "teacher" / "weights.safetensors")
    own, theirs = ([one for key, one in sorted(state.items()) if "running" in key] for state in (student, teacher))
    assert len(own) == len(theirs) > 0
    assert all(any(one.shape == other.shape and torch.equal(one, other) for other in theirs) for one in own)


def test_a_pool_of_another_origin_is_refused(config_of: Callable[..., RunConfig], borrowed: Begin) -> None:
    config = config_of("deep_inversion")
    with borrowed(config) as run:
        distill(run)
        origin = run.path / "generator" / "pool" / "origin.json"
        origin.write_text(origin.read_text().replace('"seed": 0', '"seed": 1'))
        run.manifest_file("generator").unlink()
        run.manifest_file("distill").unlink()
        with pytest.raises(ValueError, match=r"started from something else \(seed\)"):
            STAGES["distill"](run, Silent())


def test_a_batch_continues_from_the_last_state_and_as_many_features_as_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{number}.npz" for number in range(4)]
    for number, path in enumerate(files):
        banks = {f"state/{name}": np.full((3, 1), number) for name in pooling.BANKS}
        pooling.write_arrays(path, images=np.zeros(1), **banks, **{"state/head": np.array([number])})
    files[0].unlink()  # behind the features that count: it is not read
    monkeypatch.setattr(pooling, "MOST_PAIRS", 5)
    pool = pooling.BatchFiles(tmp_path, 4)
    pool.files = files
    state = pool.state(3)
    assert state["head"] == [2] and all(state[name][:, 0].tolist() == [1] * 3 + [2] * 3 for name in pooling.BANKS)
    assert pool.state(0) == {}
    pooling.write_arrays(files[2], images=np.zeros(1))
    assert pool.state(3) == {}, "without features, only the last batch is read"


def test_the_best_images_are_a_copy() -> None:
    best, images = inversions.Best(), torch.zeros(2)
    best.offer(torch.tensor(1.0), images)
    images += 1
    best.offer(torch.tensor(2.0), images)
    assert best.images.tolist() == [0, 0] and best.loss == 1
    with pytest.raises(FloatingPointError, match="lower student.data_free.lr"):
        best.offer(torch.tensor(float("nan")), images)


def test_a_blind_set_gives_no_image() -> None:
    splits = blind(synthetic_splits())
    assert isinstance(splits.train, NoImages) and len(splits.train) == 64 and len(splits.val) == 0
    for part in (splits.train, splits.train.subset(torch.arange(3)).to("cpu")):
        with pytest.raises(RealImageError, match="the run is data-free"):
            part.batch(torch.arange(2), "cpu")
    assert len(splits.test) == 32


def test_every_method_has_a_row() -> None:
    assert set(KINDS) == set(FAMILIES)
