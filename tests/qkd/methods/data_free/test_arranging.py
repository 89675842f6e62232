"""Procedural images, and how they join those of a method: shares, boxes, classes, draws, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkd.cli.entry import main
from qkd.config import AgentConfig, RunConfig
from qkd.config.conflicts import low_bit_faults
from qkd.config.data_free import DataFreeConfig
from qkd.data import Splits
from qkd.methods.data_free.float_twin import is_same_twin
from qkd.methods.data_free.making.adversary import AdversarialSource
from qkd.methods.data_free.making.arranging import Arranged, arrangement_of, in_boxes
from qkd.methods.data_free.making.procedural import KINDS, Procedural
from qkd.methods.data_free.making.sources import MadeSource, Noise
from qkd.progress import Silent
from qkd.roles.images import run_images
from qkd.roles.learner import StudentRole, student_images
from qkd.run.folder import RunFolder
from qkd.seeding import stream
from qkd.stages import STAGES
from qkd.testing import TinyNet, synthetic_splits
from qkd.training.assembly import Context

pytestmark = pytest.mark.usefixtures("eager")
CPU = torch.device("cpu")
SPLITS = synthetic_splits()


class Fake:
    """Of a job, what a source reads."""

    seed, role, device, splits = 0, "student", CPU, SPLITS
    config = type("Config", (), {"epochs": 2})()

    def __init__(self, folder: Path) -> None:
        self.folder = folder


class White:
    """A method whose images are white everywhere, with classes that were asked for."""

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:  # noqa: ARG002
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (SPLITS.mean, SPLITS.std))
        return ((1 - mean) / std).expand(count, *SPLITS.image_shape), torch.zeros(count, dtype=torch.int64)


def settings(**changes: Any) -> DataFreeConfig:
    return DataFreeConfig.model_validate({"method": "noise", **changes})


def as_pixels(images: Tensor, splits: Splits = SPLITS) -> Tensor:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (splits.mean, splits.std))
    return images * std + mean


# --- what is drawn without data and teacher


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 33)])
def test_a_kind_gives_pixels_that_differ_and_are_the_same_again(kind: str, shape: tuple[int, int, int]) -> None:
    images = KINDS[kind](12, shape, stream(0, kind))
    assert images.shape == (12, *shape) and 0 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images, KINDS[kind](12, shape, stream(0, kind)))
    assert len({float(one.sum()) for one in images}) == 12, "no two images are one"
    assert KINDS[kind](0, shape, stream(0, kind)).shape == (0, *shape)


def test_fields_are_smooth_and_windows_have_a_dark_border() -> None:
    fields, windows = (KINDS[kind](64, (1, 32, 32), stream(0, kind)) for kind in ("fields", "windows"))
    steps = (fields[..., 1:] - fields[..., :-1]).square().mean()
    assert float(steps) < 0.3 * float(fields.var()), "neighbors are alike: of unrelated pixels it is twice the variance"
    corners = windows[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert float(corners.max()) < 0.1 < float(windows[..., 16, 16].mean())


def test_shapes_are_flat_and_hide_one_another() -> None:
    images = KINDS["shapes"](64, (3, 32, 32), stream(0, "shapes"))
    steps = (images[..., 1:] - images[..., :-1]).abs()
    assert float((steps < 0.01).float().mean()) > 0.7, "most neighbors are equal"
    assert float(images.flatten(1).max(1).values.min()) > 0, "no image is empty"
    gray = (images[:, 0] - images[:, 2]).abs().amax((1, 2)) < 0.01
    assert 0 < int(gray.sum()) < 64, "in color and gray"


def test_curves_are_connected_ink_on_black() -> None:
    images = KINDS["strokes"](64, (3, 32, 32), stream(0, "strokes"))
    assert torch.equal(images[:, 0], images[:, 2]), "gray"
    ink = (images[:, 0] > 0.25).float().mean((1, 2))
    assert float(ink.min()) > 0.01 and 0.03 < float(ink.mean()) < 0.4
    larger = KINDS["strokes"](64, (1, 64, 64), stream(0, "strokes"))
    assert float((larger > 0.25).float().mean()) == pytest.approx(float(ink.mean()), rel=0.1), "thickness in parts"


def test_kinds_take_turns() -> None:
    made = Procedural((1, 8, 8), ["strokes", "fields"], SPLITS.mean, SPLITS.std, CPU)
    images, labels = made.draw(5, stream(0, "made"))
    generator = stream(0, "made")
    strokes, fields = KINDS["strokes"](3, (1, 8, 8), generator), KINDS["fields"](2, (1, 8, 8), generator)
    torch.testing.assert_close(as_pixels(images)[::2], strokes)
    torch.testing.assert_close(as_pixels(images)[1::2], fields)
    assert labels is None


# --- boxes


def test_a_box_is_a_part_of_the_plane_on_black() -> None:
    images = in_boxes(torch.ones(200, 1, 32, 32), stream(0, "boxes"))
    size = images.mean((1, 2, 3))
    assert 0.05 < float(size.min()) < 0.25 and float(size.max()) > 0.9, "boxes of many sizes"
    assert float(images.min()) == 0 and float(images.max()) == 1
    wide, tall = (images[:, 0].amax(axis).gt(0.5).float().sum(1) for axis in (1, 2))
    assert (wide / tall).min() < 0.5 and (wide / tall).max() > 2, "upright and lying ones"


def test_as_many_images_as_asked_for_are_boxed_and_the_others_stay_as_they_are() -> None:
    own = settings(boxed=0.25)
    images, labels = Arranged(White(), arrangement_of(own, SPLITS, CPU)).draw(400, stream(0, "made"))
    untouched = (as_pixels(images) > 1 - 1e-5).flatten(1).all(1).float().mean()
    assert 0.7 < float(untouched) < 0.85 and labels is None, "a boxed image may be of another class"
    loud = Arranged(Noise(SPLITS.image_shape, CPU), arrangement_of(own, SPLITS, CPU)).draw(64, stream(0, "made"))[0]
    assert float(as_pixels(loud).max()) > 1, "only what is boxed becomes pixels"
    assert arrangement_of(settings(), SPLITS, CPU).is_idle


# --- images that join


@pytest.mark.parametrize(("share", "made"), [(0.25, 12), (0.5, 8), (0.01, 15), (0.99, 1)])
def test_procedural_images_join(share: float, made: int) -> None:
    own = arrangement_of(settings(procedural_share=share), SPLITS, CPU)
    assert own.made(16) == made and own.made(1) == 1
    images, labels = Arranged(White(), own).draw(16, stream(0, "made"))
    assert images.shape == (16, *SPLITS.image_shape) and labels is None
    white = (as_pixels(images) > 1 - 1e-5).flatten(1).all(1)
    assert white.tolist() == [True] * made + [False] * (16 - made)


def test_a_batch_depends_on_seed_and_step_alone_and_the_teacher_names_its_classes(tmp_path: Path) -> None:
    teacher = TinyNet().eval()
    arrangement = arrangement_of(settings(procedural_share=0.5, boxed=0.5), SPLITS, CPU)
    job: Any = Fake(tmp_path)
    agent = AgentConfig(policy="none")
    source = MadeSource(job, White(), teacher, images=48, agent=agent, arrangement=arrangement)
    batches = list(source.batches(0, 0, 16))
    (again,) = source.batches(0, 2, 16)
    assert torch.equal(again.images, batches[2].images) and not torch.equal(again.images, batches[1].images)
    assert torch.equal(again.labels, teacher(again.images).argmax(1))


def test_without_an_arrangement_batches_are_those_of_before(tmp_path: Path) -> None:
    agent, noise = AgentConfig(policy="none"), Noise(SPLITS.image_shape, CPU)
    idle = arrangement_of(settings(), SPLITS, CPU)
    job: Any = Fake(tmp_path)
    plain, arranged = (
        next(iter(MadeSource(job, noise, TinyNet(), images=16, agent=agent, arrangement=one).batches(0, 0, 16)))
        for one in (None, idle)
    )
    assert torch.equal(plain.images, arranged.images)
    expected = noise.draw(16, stream(0, "student", "made", 0, 0))[0]
    assert torch.equal(plain.images, expected)


def test_a_joint_step_s_images_stay_first(tmp_path: Path) -> None:
    """The student sees as many of them as its share of the batch."""

    class Fixed(AdversarialSource):
        def _play(self, epoch: int, step: int, size: int) -> None:  # noqa: ARG002
            self._joint_images = White().draw(size, stream(0))[0]

    opponent: Any = type("Adversary", (), {})()
    opponent.teacher = type("Watched", (), {"net": TinyNet()})()
    opponent.settings = DataFreeConfig(method="dafl_joint", procedural_share=0.5)
    opponent.facts, opponent.net = {}, nn.Identity()
    own = arrangement_of(opponent.settings, SPLITS, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qkd.methods.data_free.making.adversary.sample_generator", lambda *_: None)
        source = Fixed(Fake(tmp_path), opponent, images=16, agent=AgentConfig(policy="none"), arrangement=own)  # type: ignore[arg-type]
        batch = next(iter(source.batches(0, 0, 16)))
    assert (as_pixels(batch.images) > 1 - 1e-5).flatten(1).all(1).tolist() == [True] * 8 + [False] * 8


# --- in a run


def test_calibration_has_the_same_kind_of_images_and_one_generator_serves_all_arrangements(
    config_of: Callable[..., RunConfig], borrowed: Callable[[RunConfig], RunFolder]
) -> None:
    config = config_of("rdskd", procedural_share=0.5, boxed=0.5)
    with borrowed(config) as run:
        splits = student_images(run.config, run_images(run))
        role = StudentRole(Context(run, splits, CPU, Silent()))
        STAGES["distill"](run, Silent())
        batch = next(iter(role._batches("calibration", 1)))
        assert float(as_pixels(batch, splits)[8:].min()) >= -1e-6 and batch.shape == (16, *splits.image_shape)
        source = run.path
    with borrowed(config_of("rdskd", {"name": "plain", "teacher.run": str(source)})) as run:
        STAGES["distill"](run, Silent())
        first, second = (json.loads((path / "manifests" / "generator.json").read_text()) for path in (source, run.path))
        assert first["files"] == second["files"]


def test_the_float_student_has_an_agent_of_its_own(
    config_of: Callable[..., RunConfig], borrowed: Callable[[RunConfig], RunFolder]
) -> None:
    changes = {
        "student.init": "float",
        "student.float_train": {"epochs": 1, "optimizer": "adamw", "lr": 1e-3},
        "student.float_agent": {"policy": "crop", "crop_padding": 2},
    }
    config = config_of("procedural", changes)
    real = config_of("procedural", {**changes, "student.data_free": None, "name": "real"})
    for one in (config, real):  # a float net learns from the teacher's view of made images, or from labels
        with borrowed(one) as run:
            splits = student_images(run.config, run_images(run))
            role = StudentRole(Context(run, splits, CPU, Silent()))
            twin = role.float_role()
            assert twin is not None and (twin.agent().policy, role.agent().policy) == ("crop", "none")
    as_agent = {**changes, "student.agent": {"policy": "crop", "crop_padding": 2}, "student.float_agent": None}
    assert is_same_twin(config, config_of("procedural", as_agent)), "where the agent stands makes no other net"
    other = {**changes, "student.float_agent": {"policy": "crop", "crop_padding": 1}}
    assert not is_same_twin(config, config_of("procedural", other))


def test_the_float_student_has_a_share_of_its_own(
    config_of: Callable[..., RunConfig], borrowed: Callable[[RunConfig], RunFolder]
) -> None:
    changes = {"student.init": "float", "student.float_train": {"epochs": 1, "optimizer": "adamw", "lr": 1e-3}}
    config = config_of("rdskd", changes, procedural_share=0.1, float_procedural_share=0.5)
    with borrowed(config) as run:
        splits = student_images(run.config, run_images(run))
        role = StudentRole(Context(run, splits, CPU, Silent()))
        twin = role.float_role()
        assert isinstance(twin, StudentRole)
        shares = [one.config.student.data_free.procedural_share for one in (role, twin)]  # type: ignore[union-attr]
        assert shares == [0.1, 0.5]
        STAGES["distill"](run, Silent())
        source = run.path
    others = {**changes, "name": "other", "teacher.run": str(source)}
    with borrowed(config_of("rdskd", others, procedural_share=0.5)) as run:
        assert run.is_complete("student_float"), "the float student of the same share is taken over"
    assert not is_same_twin(config, config_of("rdskd", others, procedural_share=0.1))


def test_no_kinds_are_left_where_the_float_student_has_no_share() -> None:
    own = settings(procedural_share=0.5, float_procedural_share=0.0, procedural_kinds=["strokes"]).of_float_student()
    assert DataFreeConfig.model_validate(own.model_dump()) == own == settings()


# --- what is refused, and what older runs wrote


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"method": "procedural", "procedural_share": 0.5},
            "all images are procedural; leave `procedural_share` out",
        ),
        ({"method": "procedural", "float_procedural_share": 0.5}, "leave `float_procedural_share` out"),
        ({"method": "procedural", "lr": 0.5}, "`procedural` .procedural. does not read 'lr'"),
        ({"procedural_kinds": ["strokes"]}, "`procedural_kinds` is for method `procedural`, or for a"),
        ({"method": "procedural", "procedural_kinds": ["fields", "fields"]}, "has duplicates: fields, fields"),
        ({"method": "procedural", "procedural_kinds": []}, "at least 1 item"),
        ({"method": "procedural", "procedural_kinds": ["clouds"]}, "'fields', 'windows', 'shapes' or 'strokes'"),
        ({"procedural_share": 1.0}, "less than 1"),
        ({"boxed": 1.5}, "less than or equal to 1"),
        ({"boxed": -0.5}, "greater than or equal to 0"),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        settings(**values)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"student.float_agent": {"policy": "none"}}, "`float_agent` is for `float_train`, which is missing"),
        ({"student.float_agent": {"policy": "search"}}, "must name a self-contained policy, got `search`"),
        ({"student.float_agent": {"policy": "cutmix"}}, "cannot use CutMix with data_free"),
    ],
)
def test_float_agents_that_are_refused(
    changes: dict[str, Any], match: str, config_of: Callable[..., RunConfig]
) -> None:
    with pytest.raises(ValueError, match=match):
        config_of("noise", changes)


def test_older_configs_are_written_as_before(config_of: Callable[..., RunConfig]) -> None:
    config = config_of("noise")
    written = config.model_dump(mode="json")["student"]
    assert not {"procedural_share", "float_procedural_share", "procedural_kinds", "boxed"} & set(written["data_free"])
    assert "float_agent" not in written and low_bit_faults(config.student) == []
    origin = settings(method="rdskd", procedural_share=0.5, boxed=0.5).origin()
    assert origin == settings(method="rdskd", images_per_epoch=5).origin(), "a generator depends on none of it"


def test_validate_names_the_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "digits/data-free/mskd-mixed"]) == 0
    assert main(["validate", "digits/data-free/mskd-mixed", "student.data_free.procedural_share=0"]) == 0
    assert main(["validate", "digits/data-free/procedural", "student.data_free.procedural_share=0.5"]) == 2
    assert "leave `procedural_share` out" in capsys.readouterr().err
