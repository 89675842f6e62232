"""FedGen: the server learns a generator of latents from clients' last layers, and clients learn from its latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from qkd.federated.averaging import State
from qkd.federated.federation import Federation
from qkd.federated.head import Head
from qkd.federated.messages import GENERATOR, Order, Reply, prefixed, state_of
from qkd.federated.strategies.strategy import Objective, Strategy
from qkd.losses import fedgen_client_loss, fedgen_generator_loss, fedgen_weight, label_shares
from qkd.training.state import below, collect, fill, restore

COUNTS = "label_counts"
WEIGHT_DECAY = 1e-2  # of the generator's Adam, as in the released code


class Latents(Strategy):
    """FedAvg whose server, after each round, trains a generator of latents that it sends to the clients of the next.

    The server needs the outputs of the clients' last layers and how many images of each class they have, but no images.

    References:
        Zhu, Hong, Zhou, `Data-Free Knowledge Distillation for Heterogeneous Federated Learning
        <https://arxiv.org/abs/2105.10056>`_, 2021, algorithm 1.
    """

    def __init__(self, federation: Federation) -> None:
        super().__init__(federation)
        self.generator = federation.generator(self.net)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=federation.settings.generator_lr, weight_decay=WEIGHT_DECAY
        )

    def sent(self, server_round: int) -> dict[str, Tensor]:
        """Return the generator, once it has learned."""
        return prefixed(GENERATOR, state_of(self.generator)) if server_round > 1 else {}

    def wanted(self) -> dict[str, Tensor]:
        """Return numbers of images per class."""
        return {COUNTS: torch.zeros(self.federation.classes, dtype=torch.int64)}

    def learn(self, server_round: int, replies: Sequence[Reply], states: Sequence[State]) -> dict[str, float]:
        """Train the generator on the last layers of the round's clients."""
        settings, device = self.federation.settings, self.federation.device
        counts = torch.stack([reply.tensors[COUNTS] for reply in replies])
        heads, shares = self._heads(states), label_shares(counts).float().to(device)
        asked = _worth_asking(counts)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.generator_lr * settings.generator_decay ** (server_round - 1)
        self.generator.train()
        losses = []
        for step in range(settings.generator_steps):
            drawn = self.federation.stream("generator", server_round, step)
            labels = asked[torch.randint(len(asked), (self.federation.config.data.batch_size,), generator=drawn)]
            noise, labels = self.generator.draw(len(labels), drawn).to(device), labels.to(device)
            latents = self.generator(noise, labels)
            logits = torch.stack([head(latents) for head in heads])
            loss = fedgen_generator_loss(logits, labels, shares, noise, latents)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(loss.item())
        return {"generator_loss": sum(losses) / len(losses)}

    def _heads(self, states: Sequence[State]) -> list[Head]:
        """Return the last layers of clients' nets in the deployed arithmetic, without gradients."""
        heads = []
        for state in states:
            fill(self.net, state)
            heads.append(Head.of(self.net, self.federation.head).frozen_copy().eval())
        return heads

    def state(self) -> dict[str, Tensor]:
        """Return the generator and its optimizer's moments."""
        return collect(self.generator, self.optimizer, None)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the generator and its optimizer's moments."""
        restore(tensors, self.generator, self.optimizer, None)


def _worth_asking(counts: Tensor) -> Tensor:
    """Return the classes of which some client has several images, as in the released code; if none, all present."""
    most = counts.amax(0)
    asked = (most > 1).nonzero().flatten()
    return asked if len(asked) else (most > 0).nonzero().flatten()


class LatentsObjective(Objective):
    """Cross-entropy of images and of latents, and the divergence from the outputs for latents of the same classes."""

    def __init__(self, federation: Federation, net: nn.Module, order: Order) -> None:
        super().__init__(federation, net, order)
        self._labels = federation.splits.train.labels[federation.parts[order.client]]
        self._head = Head.of(net, federation.head)
        self._generator = None
        if state := below(order.tensors, GENERATOR):
            self._generator = federation.generator(net).eval().requires_grad_(False)
            fill(self._generator, state)

    def loss(self, logits: Tensor, labels: Tensor, step: int) -> Tensor:
        """Return the loss of a step."""
        if self._generator is None:
            return super().loss(logits, labels, step)
        federation, order, settings = self.federation, self.order, self.federation.settings
        drawn = federation.stream("latents", order.client, order.server_round, step)
        own_classes = torch.unique(self._labels)
        others = own_classes[torch.randint(len(own_classes), (len(labels),), generator=drawn)].to(labels.device)
        with torch.no_grad():
            latents = self._generator(self._generator.draw(len(labels), drawn).to(labels.device), others)
            alike = self._generator(self._generator.draw(len(labels), drawn).to(labels.device), labels)
            targets = self._head(alike)
        weight = fedgen_weight(order.server_round - 1, start=settings.latent_weight, decay=settings.latent_decay)
        return fedgen_client_loss(logits, labels, self._head(latents), others, targets, weight=weight)

    def report(self) -> dict[str, Tensor]:
        """Return how many images of each class the client has."""
        return {COUNTS: torch.bincount(self._labels, minlength=self.federation.classes)}
