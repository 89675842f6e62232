"""A member's turn: bring the model to its state, train some epochs with its policy, score it, write its state."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qkd.agents.agent import agent_of_schedule
from qkd.config import AgentConfig
from qkd.engines.engine import current
from qkd.files import DamagedFileError, make_folder, parse_safetensors, read_metadata, read_verified, write_safetensors
from qkd.progress import Progress, Silent, Tracker
from qkd.search.images import without_validation
from qkd.search.journal import Turn
from qkd.search.population import Score
from qkd.training import Job, Trainer, TrainingError
from qkd.training.assembly import Training
from qkd.training.checkpoint import Checkpoint
from qkd.training.state import MODEL, fill

NEVER_S = 1e9  # between checkpoints: a turn keeps none, only its end matters


@dataclass(frozen=True)
class Trial:
    """What all members of a role's search share.

    Args:
        training: The role's training, with the search's length and images (``train`` and ``val``); each turn loads a
            member's state into its nets.
        agent: Crop and flip after a policy; cut-out is off during a search, as published.
        compat: ``correct`` or ``weights_only`` (`qkd.config.SearchConfig.compat`).
        progress: Where to report that a member has diverged.
    """

    training: Training
    agent: AgentConfig
    compat: str = "correct"
    progress: Progress = field(default_factory=Silent)
    _starts: list[list[dict[str, Tensor]]] = field(default_factory=list, init=False)  # fresh, then calibrated

    def __post_init__(self) -> None:
        """Keep the state of the freshly built nets: members start from it, whatever has been trained in them since."""
        if self.training.made.vary is None:
            self._starts.append([_state_of(module) for module in self._modules()])

    @property
    def job(self) -> Job:
        """Return the training of a member, except for its agent and its random draws.

        Raises:
            ValueError: If the role is not trained.
        """
        if self.training.job is None:
            raise ValueError("a search needs a role that is trained")
        return self.training.job

    def take(self, turn: Turn) -> Score:
        """Train a member to the end of its turn, score it on the validation images in eval mode, and save its state.

        Args:
            turn: What to do; its ``result`` is written as a whole or not at all.

        Returns:
            The score. A member whose loss, gradient or weights are not finite gets accuracy 0 and no state.

        Raises:
            DamagedFileError: If a state is altered or missing.
            OSError: If a state cannot be read or written.
        """
        started = time.monotonic()
        device, splits = self.job.device, self.job.splits
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a trainer seeds the global generators at every step
            trainer = self._trainer(turn)
            self._restore(trainer, turn)
            try:
                for _ in range(turn.epochs):
                    trainer.train_epoch(Tracker())
                state = trainer.state()
            except TrainingError as error:
                self.progress.warn(f"member {turn.member} diverged and will copy another: {error}")
                return Score(0.0, True, "", _images(trainer, turn), 0, time.monotonic() - started)
            accuracy = trainer.score(splits.val)
        if accuracy is None:
            raise ValueError("a search needs validation images")
        make_folder(turn.result.parent)
        sha256 = _write_state(turn.result, state)
        current().wait()  # the next turn may read it
        seconds = time.monotonic() - started
        return Score(accuracy, False, sha256, _images(trainer, turn), len(splits.val), seconds)

    def _trainer(self, turn: Turn) -> Trainer:
        shared = self.job
        agent = self.agent.model_copy(update={"cutout": 0})  # as published; it is only on in the final training
        job = replace(
            shared,
            role=f"search {shared.role} {turn.member}",  # names the member's random draws: order, augmentation, dropout
            # a turn ends where the next one begins, so its last weights are scored
            config=shared.config.model_copy(update={"checkpoint_every_s": NEVER_S, "keep": "last"}),
            splits=without_validation(shared.splits),
            agent=agent_of_schedule(turn.schedule, agent, epochs=shared.config.epochs, mean=shared.splits.mean),
            folder=turn.result.parent,
            fingerprint={},
            settings={},
        )
        return Trainer(job, self.progress)

    def _begin(self, member: int) -> None:
        """Load a member's start into the nets: its own, or the shared one."""
        made = self.training.made
        if made.vary is not None:
            made.vary(member)
            return
        self._fill(self._starts[-1])
        if len(self._starts) == 1:
            made.begin()
            self._starts.append([_state_of(module) for module in self._modules()])
        for partner in made.partners:
            if partner.optimizer is not None:
                partner.optimizer.state.clear()

    def _modules(self) -> list[nn.Module]:
        return [self.job.model, *(partner.module for partner in self.job.partners)]

    def _fill(self, states: list[dict[str, Tensor]]) -> None:
        for module, state in zip(self._modules(), states, strict=True):
            fill(module, state)

    def _restore(self, trainer: Trainer, turn: Turn) -> None:
        if turn.source is None:
            self._begin(turn.member)
            trainer.equip()
            trainer.at.epoch = turn.first_epoch
            return
        trainer.equip()
        state = _read_state(*turn.source)
        if self.compat == "weights_only" and turn.own is not None and turn.own != turn.source:
            names = {MODEL + name for name, _ in self.job.model.named_parameters()}
            state = transplant(_read_state(*turn.own), state, names)
        trainer.restore(state)


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def transplant(own: Checkpoint, donor: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """Return a member's own state with some tensors from another's: what the released search copies.

    Args:
        own: Its optimizer state, batch-norm statistics and averages are kept.
        donor: The source of the tensors.
        names: Names of the tensors to take.
    """
    taken: dict[str, Tensor] = {name: donor.tensors[name] for name in names}
    return replace(own, tensors={**own.tensors, **taken})


def _images(trainer: Trainer, turn: Turn) -> int:
    """Return how many images a turn has trained on so far."""
    return ((trainer.at.epoch - turn.first_epoch) * trainer.steps + trainer.at.step) * trainer.batch_size


def _write_state(path: Path, checkpoint: Checkpoint) -> str:
    # times and metrics are useless to the next turn, and would make equal states differ
    state = {**checkpoint.state, "seconds": 0.0, "epoch_seconds": 0.0, "rows": [], "sums": []}
    return write_safetensors(path, checkpoint.tensors, metadata={"state": json.dumps(state, sort_keys=True)})


def _read_state(path: Path, sha256: str) -> Checkpoint:
    try:
        tensors = parse_safetensors(path, read_verified(path, sha256))
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path} is missing; restore it, or delete {path.parent} to search again") from error
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; restore it, or delete {path.parent} to search again") from error
    return Checkpoint(tensors, json.loads(read_metadata(path)["state"]))
