"""Which arithmetic a training runs in: wishes, races, what is stored, and what a resumed training does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import beside
import pytest
import torch

from qkd.config import RunConfig
from qkd.config.binding import bind
from qkd.data import Splits
from qkd.engines.engine import Engine, alone, using
from qkd.progress import Silent
from qkd.run.identity import changes, differences
from qkd.testing import synthetic_splits
from qkd.training import Job, Partner, fit
from qkd.training.arithmetic import choice as under_test
from qkd.training.arithmetic.choice import FILE, Choice, decided, unraced
from qkd.training.checkpoint import CheckpointStore
from qkd.training.origin import asked_of, other_settings

loop: Any = beside.load(Path(__file__).parent.with_name("test_loop.py"))
make_job: Callable[..., Job] = loop.make_job


@pytest.fixture(scope="module")
def splits() -> Splits:
    return synthetic_splits(train=72, val=18)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """Let tiny trainings race, with stated times; return what candidates each race had."""
    held: list[list[tuple[str, str]]] = []

    def race(model: object, shape: object, candidates: list[tuple[str, str]], device: object) -> dict[Any, float]:
        held.append(list(candidates))
        times = {"float32 contiguous": 10.0, "float32 channels_last": 8.0, "bf16 contiguous": 9.0}
        return {one: times.get(" ".join(one), 5.0) for one in candidates}

    monkeypatch.setattr(under_test, "race", race)
    monkeypatch.setattr(under_test, "LEAST_STEPS", 1)
    monkeypatch.setattr(under_test, "LEAST_VALUES", 1)
    monkeypatch.setattr(under_test, "has_native_bf16", lambda device: True)
    return held


def choose(job: Job, state: dict[str, Any] | None = None) -> Choice:
    return decided(asked_of(job), 16, 72, state)


def test_a_short_training_holds_no_race_and_is_float32(tmp_path: Path, splits: Splits) -> None:
    found = choose(make_job(tmp_path, splits))
    assert (found.precision, found.memory_format, found.step_ms) == ("float32", "contiguous", {})
    assert "no race: 12 steps" in found.reason and not (tmp_path / FILE).exists()


def test_the_winner_is_written_and_used_again(tmp_path: Path, splits: Splits, races: list[Any]) -> None:
    found = choose(make_job(tmp_path, splits))
    assert (found.precision, found.memory_format) == ("bf16", "channels_last") and len(races[0]) == 4
    assert json.loads((tmp_path / FILE).read_text())["step_ms"]["float32 contiguous"] == 10.0
    assert choose(make_job(tmp_path, splits)) == found and len(races) == 1
    assert "bf16, channels_last" in found.told() and "10.0 ms" in found.told()


def test_reduced_precision_must_win_clearly(
    tmp_path: Path, splits: Splits, races: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "race", lambda *given: {one: 5.0 - 0.2 * (one[0] == "bf16") for one in given[2]})
    assert choose(make_job(tmp_path, splits)).precision == "float32"


@pytest.mark.parametrize(
    ("train", "candidates"),
    [
        ({"precision": "float32"}, [("float32", "contiguous"), ("float32", "channels_last")]),
        ({"precision": "bf16"}, [("bf16", "contiguous"), ("bf16", "channels_last")]),
        ({"memory_format": "contiguous"}, [("float32", "contiguous"), ("bf16", "contiguous")]),
    ],
)
def test_wishes_leave_fewer_candidates(
    tmp_path: Path, splits: Splits, races: list[Any], train: dict[str, str], candidates: list[Any]
) -> None:
    choose(make_job(tmp_path, splits, train=train))
    assert races == [candidates]


def test_what_is_asked_for_holds_no_race(tmp_path: Path, splits: Splits, races: list[Any]) -> None:
    job = make_job(tmp_path, splits, train={"precision": "bf16", "memory_format": "contiguous"})
    assert (choose(job).precision, choose(job).memory_format, races) == ("bf16", "contiguous", [])


def test_a_net_that_takes_no_images_holds_no_race(tmp_path: Path, splits: Splits, races: list[Any]) -> None:
    found = choose(replace(make_job(tmp_path, splits), takes_images=False))
    assert (found.precision, found.memory_format, races) == ("float32", "contiguous", [])
    assert "does not take images" in found.reason


def test_methods_with_more_nets_and_frozen_phases_keep_float32(
    tmp_path: Path, splits: Splits, races: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tmp_path, splits)
    choose(replace(job, partners=(Partner("peer", torch.nn.Linear(2, 2)),)))
    (tmp_path / FILE).unlink()
    choose(replace(job, phases=(replace(job.phases[0], allows_autocast=False),)))
    (tmp_path / FILE).unlink()
    monkeypatch.setattr(under_test, "has_native_bf16", lambda device: False)
    choose(job)
    assert all({precision for precision, _ in held} == {"float32"} for held in races) and len(races) == 3


def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path: Path, splits: Splits, races: list[Any]) -> None:
    whole = make_job(tmp_path / "whole", splits)
    fit(whole, Silent())
    loop.interrupted(tmp_path / "cut", splits, (1, 2))
    (tmp_path / "cut" / FILE).unlink()  # the checkpoint knows
    resumed = make_job(tmp_path / "cut", splits)
    fit(resumed, Silent())
    assert len(races) == 2 and loop.equal(loop.state(whole), loop.state(resumed))
    plain = make_job(tmp_path / "plain", splits, train={"precision": "float32", "memory_format": "contiguous"})
    fit(plain, Silent())
    assert not loop.equal(loop.state(whole), loop.state(plain))  # it was bf16


def test_checkpoints_without_a_choice_continue_as_they_were_made(
    tmp_path: Path, splits: Splits, races: list[Any]
) -> None:
    job = make_job(tmp_path, splits, train={"precision": "bf16", "memory_format": "channels_last"})
    fit(job, Silent())
    made = CheckpointStore(tmp_path / "checkpoint", warn=lambda _: None).load()
    assert made is not None and made.state["arithmetic"]["precision"] == "bf16"
    old = {key: value for key, value in made.state.items() if key != "arithmetic"}
    auto = make_job(tmp_path, splits)
    assert (choose(auto, old).precision, choose(auto, old).memory_format) == ("bf16", "channels_last")
    old["settings"] = {"train.autocast": "off", "train.channels_last": True}  # of a version before
    assert (choose(auto, old).precision, choose(auto, old).memory_format) == ("float32", "channels_last")
    assert choose(auto, {}).precision == "float32" and races == []


def test_a_net_is_trained_in_what_it_runs_in(
    tmp_path: Path, splits: Splits, races: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "race", lambda *given: {one: 5.0 for one in given[2] if one[1] == "contiguous"})
    found = choose(make_job(tmp_path, splits))
    assert (found.precision, found.memory_format) == ("float32", "contiguous")
    assert "fastest of 2" in found.reason
    assert "does not run in float32 channels_last, bf16 channels_last" in found.reason
    monkeypatch.setattr(under_test, "race", lambda *given: {})
    found = choose(make_job(tmp_path / "none", splits, train={"precision": "bf16"}))
    assert (found.precision, found.memory_format, found.step_ms) == ("bf16", "contiguous", {})
    assert "does not run" in found.reason and not (tmp_path / "none" / FILE).exists()


class Viewing(torch.nn.Module):
    """A teacher as many people write it: it takes a view of what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)).view(len(images), -1)  # type: ignore[no-any-return]


def test_channels_last_is_for_nets_whose_teacher_takes_it(tmp_path: Path, splits: Splits, races: list[Any]) -> None:
    teacher, adapter = Viewing().train(), torch.nn.Linear(2, 2)  # which is never called with images
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for name, others in (("fits", {"adapter": adapter}), ("views", {"adapter": adapter, "teacher": teacher})):
        asked = asked_of(replace(make_job(tmp_path / name, splits), others=others))
        decided(replace(asked, image_shape=(3, 8, 8)), 16, 72, None)
    assert [{memory_format for _, memory_format in held} for held in races] == [
        {"contiguous", "channels_last"}, {"contiguous"}
    ]  # fmt: skip
    assert teacher.training and all(torch.equal(before[name], now) for name, now in teacher.state_dict().items())


def test_channels_last_is_not_for_nets_that_pytorch_misreads_there(
    tmp_path: Path, splits: Splits, races: list[Any]
) -> None:
    misread = torch.nn.Sequential(torch.nn.Conv2d(1, 4, (5, 9), stride=(1, 4)))
    for name, change in (("model", {"model": misread}), ("teacher", {"others": (misread,)})):
        decided(replace(asked_of(make_job(tmp_path / name, splits)), **change), 16, 72, None)
    assert [{memory_format for _, memory_format in held} for held in races] == [{"contiguous"}, {"contiguous"}]


def test_what_another_training_left_is_followed_only_where_it_could_win(
    tmp_path: Path, splits: Splits, races: list[Any]
) -> None:
    job = make_job(tmp_path, splits)
    assert choose(job).precision == "bf16"
    with_peer = replace(job, partners=(Partner("peer", torch.nn.Linear(2, 2)),))
    assert choose(with_peer).precision == "float32" and len(races) == 2
    assert json.loads((tmp_path / FILE).read_text())["precision"] == "float32"


def test_all_processes_do_what_the_first_one_says(tmp_path: Path, splits: Splits, races: list[Any]) -> None:
    class Second(Engine):
        size, rank = 2, 1

        def first(self, work: Callable[[], Any]) -> Any:
            return Choice("float32", "channels_last", "told").to_json()

    (tmp_path / FILE).write_text(json.dumps(Choice("bf16", "contiguous", "left here").to_json()))
    with using(Second()):
        found = choose(make_job(tmp_path, splits))
    assert (found.precision, found.memory_format, races) == ("float32", "channels_last", [])


def test_a_race_is_about_the_share_of_a_process(
    tmp_path: Path, splits: Splits, races: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process races while it is alone: it timed the whole batch."""
    shapes: list[Any] = []

    class First(Engine):
        size, rank = 2, 0

        def first(self, work: Callable[[], Any]) -> Any:
            with alone():
                return work()

    held = under_test.race

    def noted(model: object, shape: Any, *rest: Any) -> Any:
        shapes.append(shape)
        return held(model, shape, *rest)

    monkeypatch.setattr(under_test, "race", noted)
    with using(First()):
        choose(make_job(tmp_path, splits))
    assert [shape[0] for shape in shapes] == [8]


def test_a_file_that_says_nonsense_is_not_followed(tmp_path: Path, splits: Splits, races: list[Any]) -> None:
    for text in ("{", '{"precision": "int1", "memory_format": "x"}', "[]"):
        (tmp_path / FILE).write_text(text)
        assert choose(make_job(tmp_path, splits)).precision == "bf16"
    assert len(races) == 3


def test_auto_continues_whatever_a_run_began_with() -> None:
    then, auto = {"student.train.precision": "float32"}, {"student.train.precision": "auto"}
    assert differences(then, auto) == {} and differences(auto, then) != {}
    assert changes({"train": {"precision": "bf16"}}, {"train": {"precision": "auto"}}) == {}
    assert changes({"train": {"precision": "auto"}}, {"train": {"precision": "bf16"}}) != {}
    assert other_settings({"train.autocast": "off"}, {"train.precision": "auto"}) == []
    assert other_settings({"train.autocast": "bf16"}, {"train.precision": "float32"}) != []


def test_old_names_are_read_with_a_warning() -> None:
    base = {"name": "a", "data": {"name": "digits"}, "student": {"quant": {"weight_bits": 2, "act_bits": 2}}}
    train = {"autocast": "off", "channels_last": True}
    with pytest.warns(DeprecationWarning, match="the old name will be removed"):
        config: RunConfig = bind({**base, "teacher": {"net": "resnet20", "train": train}})
    assert config.teacher.train is not None
    assert (config.teacher.train.precision, config.teacher.train.memory_format) == ("float32", "channels_last")


def test_without_a_race_auto_is_float32(tmp_path: Path, splits: Splits) -> None:
    found = unraced(asked_of(make_job(tmp_path, splits)))
    assert (found.precision, found.memory_format) == ("float32", "contiguous")
