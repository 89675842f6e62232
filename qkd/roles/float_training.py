"""A float net that is trained on its own: the teacher, or the float net that a student starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qkd.config import AgentConfig, TrainConfig
from qkd.files import sha256_of
from qkd.methods.method import Beside
from qkd.nets import load_weights
from qkd.nets.imagenet import weights_file
from qkd.roles.nets import fresh_net, load_float, net_facts, save_net, sizes_of
from qkd.roles.outcome import score, write_outcome
from qkd.roles.stored import WEIGHTS_HASH
from qkd.run.identity import leaves
from qkd.training import FitResult, Phase, supervised_step
from qkd.training.assembly import WEIGHTS, Context, Made
from qkd.training.state import fill
from quantizers.modes import evaluating


@dataclass(frozen=True)
class FloatRole:
    """A float net that is trained on the labels alone.

    Args:
        context: The run.
        name: Names its random streams and its manifest.
        folder: Its folder in the run folder.
        title: Its name for the user.
        net: A name of ``qkd ls nets``.
        train: Optimizer and length; None if its weights are used unchanged.
        agent: Returns its agent.
        stream: Names the random stream of its initial weights.
        weights: File of weights that it starts from, or ``imagenet``; None if they are random.
        head: With ``new``, the last layer of ``weights`` is left out.
        inputs: Files of the run folder that it depends on.
        beside: Returns what learns with it in its own training.
        details: Returns more keys of its result, from the trained net.
    """

    context: Context
    name: str
    folder: str
    title: str
    net: str
    train: TrainConfig | None
    agent: Callable[[], AgentConfig]
    stream: tuple[str | int, ...]
    weights: Path | None = None
    head: str = "keep"
    inputs: tuple[Path, ...] = ()
    beside: Callable[[nn.Module], Beside | None] = lambda _: None
    details: Callable[[nn.Module], dict[str, Any]] = lambda _: {}

    def make(self) -> Made:
        """Build the net and what learns with it.

        Raises:
            ValueError: If the net or its weights cannot be used.
        """
        context, train = self.context, self.train
        net = fresh_net(context.config, self.net, context.splits, *self.stream)
        source = self.source()
        if source is not None and (note := load_weights(net, source, head=self.head)):
            context.progress.say(f"{self.name}: {source}: {note}")
        net.to(context.device)
        beside = self.beside(net)
        started = {} if source is None else {WEIGHTS_HASH: sha256_of(source)}  # now: the file may change meanwhile
        agent = {} if train is None else self.agent().model_dump(mode="json", exclude={"schedule"})
        return Made(
            net,
            self._phases(net, beside),
            begin=lambda: None,
            save=lambda: self._save(net, beside),
            score=lambda fitted: [self._score(net, fitted, started)],
            partners=() if beside is None else beside.partners,
            marks={f"weights {self.weights}": digest for digest in started.values()},
            settings=dict(leaves(agent, "agent")),
            inputs=self.inputs,
            vary=lambda member: self._vary(net, member),
        )

    def source(self) -> Path | None:
        """Return the file of weights that it starts from; None if they are random."""
        return None if self.weights is None else weights_file(self.weights, self.net)

    def _phases(self, net: nn.Module, beside: Beside | None) -> tuple[Phase, ...]:
        if beside is not None:
            return (beside.phase,)
        if self.train is None:
            return ()
        step = supervised_step(net, label_smoothing=self.train.label_smoothing)
        return (Phase("supervised", self.train.epochs, step),)

    def _vary(self, net: nn.Module, member: int) -> None:
        fresh = fresh_net(self.context.config, self.net, self.context.splits, f"search {self.name}", member)
        if (source := self.source()) is not None:
            load_weights(fresh, source, head=self.head)
        fill(net, fresh.state_dict())

    def _save(self, net: nn.Module, beside: Beside | None) -> list[Path]:
        folder = self.context.run.folder(self.folder)
        save_net(folder / WEIGHTS, net, net_facts(self.net, **sizes_of(self.context.splits)))
        _require_same(self.name, net, folder / WEIGHTS, self.context.splits.image_shape)
        return [folder / WEIGHTS, *([] if beside is None else beside.save(folder))]

    def _score(self, net: nn.Module, fitted: FitResult | None, started: Mapping[str, str]) -> Path:
        context = self.context
        details = {**self.details(net), **started}
        outcome = score(self.name, self.net, net, context.splits, context.config.data, fitted, **details)
        return write_outcome(context.run.path / self.folder, outcome)


def _require_same(name: str, net: nn.Module, path: Path, image_shape: tuple[int, int, int]) -> None:
    """Raise if a stored net, loaded again as those who use it do, is another function than the one that was trained.

    Raises:
        ValueError: If so, which is the case if forward passes changed something that the state does not hold.
    """
    device = next((one.device for one in net.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), evaluating(net), torch.no_grad():
        images, again = torch.rand(2, *image_shape), load_float(path)
        torch.manual_seed(0)  # for a net that draws at random in eval mode, too
        trained = net(images.to(device)).cpu()
        torch.manual_seed(0)
        stored = again(images)
    if not torch.allclose(trained, stored, rtol=1e-2, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"{name}: loaded from {path}, the net computes other logits than the trained one: something that changed "
            f"in training is not in its state_dict; make it a buffer: `self.register_buffer(NAME, tensor)`"
        )
