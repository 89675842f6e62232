"""Nets that learn beside the model: their optimizer groups, their checkpoints, and phases that leave them alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qkd.agents import build_agent
from qkd.config import AgentConfig, DataConfig, TrainConfig
from qkd.progress import Silent
from qkd.seeding import global_stream
from qkd.testing import TinyNet, synthetic_splits
from qkd.training import Batch, Job, Partner, Phase, StepResult, TrainingError, fit
from qkd.training.state import collect, restore

DATA = DataConfig(name="npz", path=Path("unused"), batch_size=16)


class Interrupted(Exception):
    """Stands for a kill."""


class Pair:
    """A model and two partners: one in the loop's optimizer, one with its own optimizer."""

    def __init__(self, *, stop_at: int = -1) -> None:
        with global_stream(0, "init"):
            self.net, self.joined, self.own = TinyNet(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.own.parameters(), lr=0.05, momentum=0.9)
        self.stop_at, self.steps = stop_at, 0

    def step(self, batch: Batch) -> StepResult:
        if self.steps == self.stop_at:
            raise Interrupted
        self.steps += 1
        logits = self.net(batch.images)
        moved = nn.functional.cross_entropy(self.own(logits.detach()), batch.labels)
        self.optimizer.zero_grad()
        moved.backward()
        self.optimizer.step()
        with torch.no_grad():
            shift = self.own(logits)
        loss = nn.functional.cross_entropy(self.joined(logits) + shift, batch.labels)
        return StepResult(loss, {"all": loss}, logits, facts={"shift": shift.mean()})

    def alone(self, batch: Batch) -> StepResult:
        logits = self.net(batch.images)
        loss = nn.functional.cross_entropy(logits, batch.labels)
        return StepResult(loss, {"alone": loss}, logits)

    def job(self, folder: Path, *, factor: float = 0.5) -> Job:
        folder.mkdir(parents=True, exist_ok=True)
        config = TrainConfig(epochs=3, lr=0.1, checkpoint_every_s=0)
        splits = synthetic_splits(train=72, val=18)
        partners = (Partner("joined", self.joined, factor), Partner("own", self.own, optimizer=self.optimizer))
        phases = (Phase("both", 2, self.step), Phase("alone", 1, self.alone))
        agent = build_agent(AgentConfig(policy="crop", crop_padding=1), epochs=3, mean=splits.mean)
        return Job("student", self.net, config, DATA, splits, agent, phases, 0, torch.device("cpu"), folder,
                   partners=partners)  # fmt: skip

    def state(self) -> dict[str, torch.Tensor]:
        nets = {"net": self.net, "joined": self.joined, "own": self.own}
        return {f"{kind}.{name}": value for kind, net in nets.items() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_partners_resume_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    whole = Pair()
    fit(whole.job(tmp_path / "whole"), Silent())
    cut = Pair(stop_at=stop_at)
    with pytest.raises(Interrupted):
        fit(cut.job(tmp_path / "cut"), Silent())
    again = Pair()
    fit(again.job(tmp_path / "cut"), Silent())
    expected = whole.state()
    assert all(torch.equal(value, expected[name]) for name, value in again.state().items())
    before = Pair().state()
    assert all(not torch.equal(value, before[name]) for name, value in expected.items() if name.endswith("weight"))


def test_state_of_what_is_frozen_now_is_refused() -> None:
    """It would be dropped, and the training be neither the earlier one nor a new one."""
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    kept = collect(net, optimizer, None)
    restore(kept, net, optimizer, None)
    with pytest.raises(ValueError, match="weight was trained then, and is frozen now"):
        restore(kept, net, torch.optim.SGD([net.bias], lr=0.1, momentum=0.9), None)


def test_a_phase_without_gradients_leaves_a_partner_alone(tmp_path: Path) -> None:
    pair = Pair()
    job = pair.job(tmp_path)
    before = {name: value.clone() for name, value in pair.state().items()}
    still = Job(**{**vars(job), "phases": (Phase("alone", 3, pair.alone),)})
    fit(still, Silent())
    after = pair.state()
    assert all(torch.equal(after[name], value) for name, value in before.items() if not name.startswith("net"))


def test_facts_have_their_mean_in_the_metrics(tmp_path: Path) -> None:
    rows = fit(Pair().job(tmp_path), Silent()).rows
    assert set(rows[0]["facts"]) == {"shift"}
    assert "facts" not in rows[2]


def test_a_partner_that_breaks_is_named(tmp_path: Path) -> None:
    pair = Pair()
    with torch.no_grad():
        pair.own.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"own\.weight"):
        fit(pair.job(tmp_path), Silent())
