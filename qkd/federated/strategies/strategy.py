"""The interface of federated strategies, for server and client; the base class is federated averaging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qkd.federated.averaging import State, average_states
from qkd.federated.federation import Federation
from qkd.federated.messages import MODEL, Order, Reply, Task, prefixed
from qkd.losses import cross_entropy_loss

NOT_FINITE = "its update holds NaN or an infinity"
OF_ANOTHER = "its update is not of this run's student"
NO_IMAGES = "it does not say how many images its figures are from"


class FederationError(RuntimeError):
    """A round that cannot be finished because no client is left."""


@dataclass(frozen=True)
class Aggregate:
    """The result of a round of training.

    Args:
        model: State of the global net.
        weights: Client -> its weight in the average.
        dropped: Client -> why it was left out.
        metrics: Name -> number: means over the clients, and metrics of the strategy.
    """

    model: dict[str, Tensor]
    weights: dict[int, float]
    dropped: dict[int, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Objective:
    """What a client minimizes in a round; in this base class, the cross-entropy of its images.

    Args:
        federation: The run.
        net: The client's net, with the global weights.
        order: What the server sent.
    """

    def __init__(self, federation: Federation, net: nn.Module, order: Order) -> None:
        self.federation, self.net, self.order = federation, net, order

    def loss(self, logits: Tensor, labels: Tensor, step: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a step.

        Args:
            logits: Of a batch of the client's images, in training mode.
            labels: Their classes.
            step: Step of the round, from 0.
        """
        return cross_entropy_loss(logits, labels)

    def report(self) -> dict[str, Tensor]:
        """Return what is uploaded in addition to the net, after the last step."""
        return {}


class Strategy:
    """The server side: which clients it asks, what it sends, and how it combines the replies. This base is FedAvg.

    Its four main methods are named as in Flower's strategies (message API), with our values in place of its messages.

    Args:
        federation: The run.

    References:
        McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
        <https://arxiv.org/abs/1602.05629>`_, 2017, algorithm 1.
    """

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.net = federation.net()  # the server's own, to decode uploads and to score
        self.upload = federation.upload(self.net)
        self._calibrated: State = {}  # what the clients calibrate

    # the same as in Flower's strategies

    def configure_train(self, server_round: int, model: State) -> list[Order]:
        """Return the orders to the clients of a round.

        Args:
            server_round: From 1; round 0 calibrates.
            model: State of the global net.
        """
        task: Task = "train" if server_round else "calibrate"
        self._calibrated = {} if server_round else model
        tensors = prefixed(MODEL, model) | (self.sent(server_round) if server_round else {})
        return [Order(client, task, server_round, tensors) for client in self.clients(server_round)]

    def aggregate_train(self, server_round: int, replies: Sequence[Reply]) -> Aggregate:
        """Return the average of the clients' nets, weighted by their images; failed clients are left out.

        Raises:
            FederationError: If all of them failed.
        """
        replies = sorted(replies, key=lambda reply: reply.client)  # so that sums do not depend on the order of replies
        nets: dict[int, State] = {}
        dropped: dict[int, str] = {}
        for reply in replies:
            why = self.fault(reply) or (self._unlike(reply.tensors, self.wanted()) if server_round else "")
            if not why:
                try:
                    nets[reply.client] = self._decoded(server_round, reply.tensors)
                except (KeyError, ValueError) as error:
                    why = f"{OF_ANOTHER}: {error}"
                else:
                    why = self._unlike(nets[reply.client], self.net.state_dict(), whole=True)
            if why:
                dropped[reply.client] = why
        kept = [reply for reply in replies if reply.client not in dropped]
        if not kept:
            why = "; ".join(f"client {client}: {text}" for client, text in dropped.items()) or "none was asked"
            raise FederationError(f"round {server_round}: no client is left ({why})")
        states = [nets[reply.client] for reply in kept]
        images = [reply.metrics["images"] for reply in kept]
        shares = {reply.client: count / sum(images) for reply, count in zip(kept, images, strict=True)}
        metrics = _means(kept, list(shares.values()))
        if server_round:
            metrics |= self.learn(server_round, kept, states)
        return Aggregate(average_states(states, images), shares, dropped, metrics)

    def _decoded(self, server_round: int, tensors: State) -> State:
        if server_round:
            return self.upload.decode(tensors)
        return self.upload.decode_calibrated(tensors, self._calibrated)

    def configure_evaluate(self, server_round: int, model: State) -> list[Order]:
        """Return the orders to score the global net, for clients of the round that have validation images."""
        if not self.is_scored(server_round):
            return []
        asked = [client for client in self.clients(server_round) if len(self.federation.val_parts[client])]
        return [Order(client, "evaluate", server_round, prefixed(MODEL, model)) for client in asked]

    def aggregate_evaluate(self, server_round: int, replies: Sequence[Reply]) -> dict[str, float]:  # noqa: ARG002
        """Return the share of all validation images classified correctly; empty if no client scored any."""
        scored = sorted((reply for reply in replies if not self.score_fault(reply)), key=lambda reply: reply.client)
        images = sum(reply.metrics["images"] for reply in scored)
        return {"val_accuracy": sum(reply.metrics["right"] for reply in scored) / images} if images else {}

    # what a strategy may change

    def sent(self, server_round: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Return what clients receive in addition to the global net."""
        return {}

    def wanted(self) -> dict[str, Tensor]:
        """Return tensors of the shapes and types that clients send in addition to their nets after a training."""
        return {}

    def learn(self, server_round: int, replies: Sequence[Reply], states: Sequence[State]) -> dict[str, float]:  # noqa: ARG002
        """Learn from the clients' replies before they are averaged, and return metrics.

        Args:
            server_round: From 1.
            replies: Of the clients that did not fail, in the order of clients.
            states: Of their nets.
        """
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what the server keeps between rounds in addition to the global net."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`state` returned.

        Raises:
            ValueError: If it is another strategy's.
        """
        if tensors:
            raise ValueError(f"a checkpoint holds {', '.join(sorted(tensors)[:3])}, which this strategy does not use")

    # shared by all strategies

    def clients(self, server_round: int) -> list[int]:
        """Return the clients of a round, ascending; each round draws its own."""
        settings = self.federation.settings
        count = settings.clients_per_round or settings.clients
        order = torch.randperm(settings.clients, generator=self.federation.stream("clients", server_round))
        return sorted(order[:count].tolist())

    def is_scored(self, server_round: int) -> bool:
        """Return whether the global net is scored after a round."""
        settings = self.federation.settings
        return server_round == settings.rounds or (server_round > 0 and server_round % settings.evaluate_every == 0)

    def fault(self, reply: Reply) -> str:
        """Return why a reply cannot be used; empty if it can."""
        if reply.error:
            return reply.error
        floats = (tensor for tensor in reply.tensors.values() if tensor.is_floating_point())
        is_finite = all(map(math.isfinite, reply.metrics.values())) and all(
            bool(one.isfinite().all()) for one in floats
        )
        if not is_finite:
            return NOT_FINITE
        return "" if reply.metrics.get("images", 0) > 0 else NO_IMAGES

    def score_fault(self, reply: Reply) -> str:
        """Return why a reply with scores cannot be used; empty if it can."""
        if fault := self.fault(reply):
            return fault
        right, images = reply.metrics.get("right", -1.0), reply.metrics["images"]
        return "" if 0 <= right <= images else f"it says that {right:g} of {images:g} images are right"

    @staticmethod
    def _unlike(found: State, wanted: State, *, whole: bool = False) -> str:
        """Return which tensor of a reply is missing or another than wanted, or, of a whole net, more than wanted."""
        for name, tensor in wanted.items():
            if name not in found:
                return f"{OF_ANOTHER}: {name} is missing"
            if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
                texts = [f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in (found[name], tensor)]
                return f"{OF_ANOTHER}: {name} is {texts[0]}, wanted {texts[1]}"
        more = sorted({*found} - {*wanted}) if whole else []
        return f"{OF_ANOTHER}, which has no {more[0]}" if more else ""


def _means(replies: Sequence[Reply], shares: Sequence[float]) -> dict[str, float]:
    names = {name for reply in replies for name in reply.metrics} - {"images"}
    return {
        name: sum(reply.metrics[name] * share for reply, share in zip(replies, shares, strict=True))
        for name in sorted(names)
    }
