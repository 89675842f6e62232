"""A member's turn: the whole state continues, the released copy takes weights alone, scores are taken in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qkd.agents import Op, Policy, Schedule, Segment, build_agent
from qkd.config import AgentConfig, DataConfig, TrainConfig
from qkd.data import Splits
from qkd.files import DamagedFileError, read_safetensors, sha256_of
from qkd.search import Trial, Turn, start_policy
from qkd.seeding import global_stream
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Job, Phase, accuracy, supervised_step
from qkd.training.assembly import Made, Training
from qkd.training.state import fill

EPOCHS = 4
CPU = torch.device("cpu")


def trial(splits: Splits | None = None, **changes: Any) -> Trial:
    net, images = TinyNet(), splits or synthetic_splits()
    train = TrainConfig(epochs=EPOCHS, optimizer="adamw", lr=0.01, **changes.pop("train", {}))
    agent = changes.pop("agent", AgentConfig(policy="search", crop_padding=1, flip=False, cutout=3))

    def vary(member: int) -> None:
        with global_stream(0, "init", member):
            fill(net, TinyNet().state_dict())

    phases = (Phase("supervised", EPOCHS, supervised_step(net)),)
    data = DataConfig(name="digits", batch_size=16)
    made = Made(net, phases, begin=list, save=list, score=lambda _: [], vary=vary)
    job = Job(
        "teacher",
        net,
        train,
        data,
        images,
        build_agent(AgentConfig(), epochs=EPOCHS, mean=images.mean),
        phases,
        0,
        CPU,
        Path(),
    )
    return Trial(Training(job, made, Path()), agent, **changes)


def turn(folder: Path, number: int, member: int, source: int | None = None, **changes: Any) -> Turn:
    def kept(index: int) -> tuple[Path, str]:
        path = folder / f"{number - 1}-{index}"
        return path, sha256_of(path)

    origin = member if source is None else source
    values: dict[str, Any] = {
        "number": number,
        "member": member,
        "first_epoch": number,
        "epochs": 1,
        "schedule": Schedule((Segment(EPOCHS, start_policy()),)),
        "source": kept(origin) if number else None,
        "own": kept(member) if number and (folder / f"{number - 1}-{member}").exists() else None,
        "result": folder / f"{number}-{member}",
    }
    return Turn(**{**values, **changes})


def state(folder: Path, number: int, member: int) -> dict[str, Tensor]:
    return read_safetensors(folder / f"{number}-{member}")


def test_turns_give_the_bits_of_one_long_training(tmp_path: Path) -> None:
    for ema in (0.0, 0.9):
        cut, whole = tmp_path / f"cut{ema}", tmp_path / f"whole{ema}"
        for number in range(EPOCHS):
            score = trial(train={"ema_decay": ema}).take(turn(cut, number, 0))  # a new model for every turn
        long = trial(train={"ema_decay": ema}).take(turn(whole, 0, 0, epochs=EPOCHS))
        assert score.accuracy == long.accuracy and score.state_sha256 == long.state_sha256 != ""
        assert (cut / f"{EPOCHS - 1}-0").read_bytes() == (whole / "0-0").read_bytes()
        assert long.trained_images == 4 * 64 and score.trained_images == 64 and score.validated_images == 16


def test_a_copy_takes_over_the_whole_state(tmp_path: Path) -> None:
    one = trial()
    for member in (0, 1):
        one.take(turn(tmp_path, 0, member))
    before = state(tmp_path, 0, 1)
    kinds = {name.split("/")[0] for name in before}
    assert kinds == {"model", "optimizer"} and any("running_mean" in name for name in before)
    assert any("exp_avg" in name for name in before)
    seen: dict[str, Tensor] = {}

    def spy(trainer_turn: Turn) -> None:
        fresh = trial()
        trainer = fresh._trainer(trainer_turn)
        fresh._restore(trainer, trainer_turn)
        seen.clear()
        seen.update({name: tensor.clone() for name, tensor in trainer.state().tensors.items()})
        assert trainer.at.epoch == 1 and trainer.at.step == 0

    spy(turn(tmp_path, 1, 0, source=1))
    assert seen.keys() == before.keys() and all(torch.equal(seen[name], before[name]) for name in before)


def test_the_released_copy_takes_weights_alone(tmp_path: Path) -> None:
    one = trial(compat="weights_only")
    for member in (0, 1):
        one.take(turn(tmp_path, 0, member))
    own, donor = state(tmp_path, 0, 0), state(tmp_path, 0, 1)
    copy = turn(tmp_path, 1, 0, source=1)
    trainer = one._trainer(copy)
    one._restore(trainer, copy)
    mixed = trainer.state().tensors
    weights = {f"model/{name}" for name, _ in TinyNet().named_parameters()}
    assert weights < mixed.keys() == own.keys()
    for name, tensor in mixed.items():
        assert torch.equal(tensor, (donor if name in weights else own)[name]), name
    changed = [name for name in own if name not in weights and not torch.equal(own[name], donor[name])]
    assert any("running_mean" in name for name in changed) and any("exp_avg" in name for name in changed)
    # a member that has lost its own state can only take the whole of the other's
    trainer = one._trainer(replace(copy, own=None))
    one._restore(trainer, replace(copy, own=None))
    assert all(torch.equal(tensor, donor[name]) for name, tensor in trainer.state().tensors.items())


def test_members_draw_for_themselves(tmp_path: Path) -> None:
    one = trial()
    scores = [one.take(turn(tmp_path, 0, member)) for member in (0, 1, 0)]
    assert scores[0].state_sha256 == scores[2].state_sha256 != scores[1].state_sha256


def test_a_policy_makes_a_difference_and_cut_out_is_off(tmp_path: Path) -> None:
    loud = Schedule((Segment(EPOCHS, Policy((Op("Invert", 1.0, 0), Op("Rotate", 1.0, 9)))),))
    with_op = trial().take(turn(tmp_path, 0, 0, schedule=loud))
    plain = trial().take(turn(tmp_path, 0, 0))
    assert with_op.state_sha256 != plain.state_sha256
    uncut = trial(agent=AgentConfig(policy="search", crop_padding=1, flip=False)).take(turn(tmp_path, 0, 0))
    assert uncut.state_sha256 == plain.state_sha256


def test_scores_are_of_the_validation_images_in_eval_mode(tmp_path: Path) -> None:
    modes: list[bool] = []
    one = trial()
    handle = one.job.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    score = one.take(turn(tmp_path, 0, 0, epochs=2))
    handle.remove()
    assert modes == [True] * 8 + [False]  # 8 steps, one batch of validation images
    fresh = trial()
    fill(fresh.job.model, {name.removeprefix("model/"): tensor for name, tensor in state(tmp_path, 0, 0).items()
                       if name.startswith("model/")})  # fmt: skip
    before = {name: tensor.clone() for name, tensor in fresh.job.model.state_dict().items()}
    expected = accuracy(fresh.job.model, fresh.job.splits.val, fresh.job.splits, fresh.job.data, CPU)
    assert score.accuracy == expected
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.job.model.state_dict().items())


class Counting:
    """Counts the images that are read."""

    def __init__(self, split: Any) -> None:
        self.split, self.read = split, 0
        self.labels, self.decodes = split.labels, split.decodes

    def __len__(self) -> int:
        return len(self.split)

    def batch(self, indices: Tensor, device: Any) -> Any:
        self.read += len(indices)
        return self.split.batch(indices, device)

    def subset(self, indices: Tensor) -> Any:
        return self.split.subset(indices)


def test_validation_images_are_read_once_a_turn(tmp_path: Path) -> None:
    splits = synthetic_splits()
    splits.val = counter = Counting(splits.val)  # type: ignore[assignment]
    splits.test = Counting(splits.test)  # type: ignore[assignment]
    one = trial(splits)
    one.take(turn(tmp_path, 0, 0, epochs=3))
    one.take(turn(tmp_path, 1, 0, first_epoch=3))
    assert counter.read == 2 * 16 and splits.test.read == 0  # type: ignore[attr-defined]


def exploding(net: nn.Module, at_epoch: int) -> Callable[[Any], Any]:
    step = supervised_step(net)

    def explode(batch: Any) -> Any:
        result = step(batch)
        return replace(result, loss=result.loss * float("nan")) if batch.epoch >= at_epoch else result

    return explode


def test_a_member_that_diverges_scores_nothing(tmp_path: Path) -> None:
    one = trial()
    job = replace(one.job, phases=(Phase("supervised", EPOCHS, exploding(one.job.model, 1)),))
    bad = replace(one, training=replace(one.training, job=job))
    score = bad.take(turn(tmp_path, 0, 0, epochs=2))
    assert (score.accuracy, score.is_diverged, score.state_sha256) == (0.0, True, "")
    assert score.trained_images == 64 and score.validated_images == 0 and not (tmp_path / "0-0").exists()
    assert trial().take(turn(tmp_path, 0, 1)).state_sha256 == one.take(turn(tmp_path, 0, 1)).state_sha256


def test_an_altered_state_is_refused(tmp_path: Path) -> None:
    one = trial()
    one.take(turn(tmp_path, 0, 0))
    following = turn(tmp_path, 1, 0)
    (tmp_path / "0-0").write_bytes((tmp_path / "0-0").read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedFileError, match=r"truncated or altered.*delete .* to search again"):
        one.take(following)
    (tmp_path / "0-0").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is a pickled file"):
        one.take(following)
    (tmp_path / "0-0").unlink()
    with pytest.raises(DamagedFileError, match=r"0-0 is missing; restore it, or delete"):
        one.take(following)


def test_a_search_for_a_training_that_keeps_the_best_epoch_scores_the_last_one(tmp_path: Path) -> None:
    """A turn ends where the next one begins. It was refused when the search began: "there are no validation images"."""
    kept, last = (trial(train={"keep": keep}).take(turn(tmp_path / keep, 0, 0, epochs=2)) for keep in ("best", "last"))
    assert kept.accuracy == last.accuracy and kept.state_sha256 == last.state_sha256 != ""
