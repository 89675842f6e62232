"""A member's turn: bring the model to its state, train some epochs with its policy, score it, write its state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qkd.agents.agent import agent_of_schedule
from qkd.config import AgentConfig, DataConfig, TrainConfig
from qkd.data import Splits
from qkd.files import DamagedFileError, make_folder, parse_safetensors, read_metadata, read_verified, write_safetensors
from qkd.progress import Progress, Silent, Tracker
from qkd.search.images import without_validation
from qkd.search.journal import Turn
from qkd.search.population import Score
from qkd.training import Job, Partner, Phase, Trainer, TrainingError
from qkd.training.checkpoint import Checkpoint
from qkd.training.state import MODEL

NEVER_S = 1e9  # between checkpoints: a turn keeps none, its end is what counts


@dataclass(frozen=True)
class Trial:
    """What all members of a role's search share.

    Args:
        role: ``teacher`` or ``student``.
        model: Trained in place, on ``device``; each turn puts a member's state into it.
        train: Optimizer and learning rate; its length is the search's.
        data: Batch sizes and workers.
        splits: The search's images: ``train`` and ``val``.
        agent: Crop and flip that follow a policy; cut-out is off during a search, as published.
        phases: Of the training, with the search's length.
        seed: The run's.
        device: Where the model is.
        begin: Brings the model to a member's start.
        scales: Gives the quantizer scales among the model's parameters.
        others: Role -> further models that a diagnosis watches.
        partners: Nets that are trained beside the model; ``begin`` brings them to their start, too.
        compat: ``correct`` or ``weights_only`` (`qkd.config.SearchConfig.compat`).
        progress: Where to say that a member has diverged.
    """

    role: str
    model: nn.Module
    train: TrainConfig
    data: DataConfig
    splits: Splits
    agent: AgentConfig
    phases: tuple[Phase, ...]
    seed: int
    device: torch.device
    begin: Callable[[int], None]
    scales: Callable[[], Iterable[nn.Parameter]] = tuple
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    partners: tuple[Partner, ...] = ()
    compat: str = "correct"
    progress: Progress = field(default_factory=Silent)

    def take(self, turn: Turn) -> Score:
        """Train a member to the end of its turn, score it on the validation images in eval mode, and keep its state.

        Args:
            turn: What to do; its ``result`` is written, whole or not at all.

        Returns:
            The score. A member whose loss, gradient or weights are not finite has accuracy 0 and no state.

        Raises:
            DamagedFileError: If a state is altered or gone.
            OSError: If a state cannot be read or written.
        """
        started = time.monotonic()
        devices = [self.device] if self.device.type == "cuda" else []
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
            accuracy = trainer.score(self.splits.val)
        if accuracy is None:
            raise ValueError("a search needs validation images")
        make_folder(turn.result.parent)
        sha256 = _write_state(turn.result, state)
        seconds = time.monotonic() - started
        return Score(accuracy, False, sha256, _images(trainer, turn), len(self.splits.val), seconds)

    def _trainer(self, turn: Turn) -> Trainer:
        job = Job(
            role=f"search {self.role} {turn.member}",  # names the member's own draws: order, augmentation, dropout
            model=self.model,
            config=self.train.model_copy(update={"checkpoint_every_s": NEVER_S}),
            data=self.data,
            splits=without_validation(self.splits),
            agent=agent_of_schedule(
                turn.schedule,
                self.agent.model_copy(update={"cutout": 0}),
                epochs=self.train.epochs,
                mean=self.splits.mean,
            ),
            phases=self.phases,
            seed=self.seed,
            device=self.device,
            folder=turn.result.parent,
            scales=self.scales,
            others=self.others,
            partners=self.partners,
        )
        return Trainer(job, self.progress)

    def _restore(self, trainer: Trainer, turn: Turn) -> None:
        if turn.source is None:
            self.begin(turn.member)
            trainer.equip()
            trainer.at.epoch = turn.first_epoch
            return
        trainer.equip()
        state = _read_state(*turn.source)
        if self.compat == "weights_only" and turn.own is not None and turn.own != turn.source:
            names = {MODEL + name for name, _ in self.model.named_parameters()}
            state = transplant(_read_state(*turn.own), state, names)
        trainer.restore(state)


def transplant(own: Checkpoint, donor: Checkpoint, names: Iterable[str]) -> Checkpoint:
    """Return a member's own state with some tensors of another's: what the released search copies.

    Args:
        own: Keeps its optimizer's state, its batch-norm statistics and its averages.
        donor: Gives the tensors.
        names: Of the tensors to take.
    """
    taken: dict[str, Tensor] = {name: donor.tensors[name] for name in names}
    return replace(own, tensors={**own.tensors, **taken})


def _images(trainer: Trainer, turn: Turn) -> int:
    """Return how many images a turn has trained on so far."""
    return ((trainer.at.epoch - turn.first_epoch) * trainer.steps + trainer.at.step) * trainer.batch_size


def _write_state(path: Path, checkpoint: Checkpoint) -> str:
    # clocks and metrics are of no use to the next turn, and would make equal states differ
    state = {**checkpoint.state, "seconds": 0.0, "epoch_seconds": 0.0, "rows": [], "sums": []}
    return write_safetensors(path, checkpoint.tensors, metadata={"state": json.dumps(state, sort_keys=True)})


def _read_state(path: Path, sha256: str) -> Checkpoint:
    try:
        tensors = parse_safetensors(path, read_verified(path, sha256))
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path}: is gone; restore it, or delete {path.parent} to search anew") from error
    except DamagedFileError as error:
        raise DamagedFileError(f"{error}; restore it, or delete {path.parent} to search anew") from error
    return Checkpoint(tensors, json.loads(read_metadata(path)["state"]))
