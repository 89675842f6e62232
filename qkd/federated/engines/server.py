"""The server of a federated run: rounds with their costs, scores, and checkpoints; any engine can drive it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkd.federated.federation import Federation
from qkd.federated.messages import MODEL, Order, Reply, prefixed, tensor_bytes
from qkd.federated.strategies import STRATEGIES
from qkd.progress import Progress
from qkd.run.identity import FREE
from qkd.training.checkpoint import Checkpoint, CheckpointStore
from qkd.training.evaluate import accuracy
from qkd.training.origin import other_settings
from qkd.training.state import below, fill
from qkd.units import percent

MAY_CHANGE = (
    "rounds",
    "evaluate_every",
    *(key.partition(".")[2] for key in FREE if key.startswith("federated.")),
)  # keys that do not affect a round
SHOWN = 4  # differences to name
STRATEGY = "strategy/"  # prefix in a checkpoint; the net has the one of messages


class Server:
    """The global net, the strategy, and the record of each round.

    An engine calls, for each round, ``configure_train``, ``aggregate_train``, ``configure_evaluate``,
    ``aggregate_evaluate`` (as Flower's strategies are called) and ``close_round``.

    Args:
        federation: The run.
        store: Where a checkpoint is written after each round.
        progress: Where to warn of clients that failed.
    """

    def __init__(self, federation: Federation, store: CheckpointStore, progress: Progress) -> None:
        self.federation, self.store, self.progress = federation, store, progress
        self.strategy = STRATEGIES[federation.settings.strategy].server(federation)
        self.model: dict[str, Tensor] = dict(federation.start)
        self.rows: list[dict[str, Any]] = []
        self._row: dict[str, Any] = {}

    def resume(self) -> None:
        """Return to the last closed round, if there is one.

        Raises:
            ValueError: If the checkpoint is of another run.
        """
        checkpoint = self.store.load()
        if checkpoint is None:
            return
        self._require_same_run(checkpoint)
        self.model = below(checkpoint.tensors, MODEL)
        self.rows = list(checkpoint.state["rows"])
        self.progress.say(f"federated: resuming after round {self.rows[-1]['round']}")

    def _settings(self) -> dict[str, Any]:
        """Return what a round depends on besides the rounds before it."""
        federation = self.federation
        own = federation.settings.model_dump(mode="json", exclude=set(MAY_CHANGE))
        start = hashlib.sha256()
        for name, tensor in sorted(federation.start.items()):
            start.update(name.encode())
            start.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {
            **{f"federated.{key}": value for key, value in own.items()},
            "seed": federation.seed,
            "images": federation.splits.fingerprint,
            "start": start.hexdigest(),
        }

    def _require_same_run(self, checkpoint: Checkpoint) -> None:
        """Restore net and strategy, unless the checkpoint is of another run.

        Raises:
            ValueError: If so.
        """
        faults = other_settings(checkpoint.state.get("settings"), self._settings())
        if not faults:  # older checkpoints have no settings
            try:
                fill(self.strategy.net, below(checkpoint.tensors, MODEL))
                self.strategy.restore(below(checkpoint.tensors, STRATEGY))
            except (KeyError, RuntimeError, ValueError) as error:
                faults.append(str(error))
        if faults:
            more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise ValueError(
                f"{self.store.folder}: the checkpoint is of another run ({'; '.join(faults[:SHOWN])}{more}); restore "
                f"the one of this run, or delete {self.store.folder.parent} to train again"
            )

    def rounds(self) -> range:
        """Return the rounds that are left."""
        first = self.rows[-1]["round"] + 1 if self.rows else self.federation.first_round
        return range(first, self.federation.settings.rounds + 1)

    def configure_train(self, server_round: int) -> list[Order]:
        """Return the orders to the clients of a round."""
        orders = self.strategy.configure_train(server_round, self.model)
        self._row = {
            "round": server_round,
            "clients": [order.client for order in orders],
            "bytes_down": sum(tensor_bytes(order.tensors) for order in orders),
        }
        return orders

    def aggregate_train(self, server_round: int, replies: Iterable[Reply]) -> None:
        """Take the clients' answers as the new global net.

        Raises:
            FederationError: If every client failed.
        """
        answers = list(replies)
        silent = {*self._row["clients"]} - {reply.client for reply in answers}
        answers += [Reply(client, error="it did not answer") for client in sorted(silent)]
        made = self.strategy.aggregate_train(server_round, answers)
        self.model = made.model
        for client, why in made.dropped.items():
            self.progress.warn(f"round {server_round}: client {client} is left out: {why}")
        self._row |= {
            "bytes_up": sum(tensor_bytes(reply.tensors) for reply in answers),
            "weights": {str(client): share for client, share in made.weights.items()},
            "dropped": {str(client): why for client, why in made.dropped.items()},
            **made.metrics,
        }

    def configure_evaluate(self, server_round: int) -> list[Order]:
        """Return the scoring orders to clients."""
        orders = self.strategy.configure_evaluate(server_round, self.model)
        self._row["evaluation_bytes_down"] = sum(tensor_bytes(order.tensors) for order in orders)
        return orders

    def aggregate_evaluate(self, server_round: int, replies: Sequence[Reply]) -> None:
        """Take the clients' scores; clients that failed to score are left out."""
        for reply in replies:
            if why := self.strategy.score_fault(reply):
                self.progress.warn(f"round {server_round}: client {reply.client} did not score: {why}")
        self._row |= self.strategy.aggregate_evaluate(server_round, replies)

    def close_round(self, server_round: int) -> str:
        """Score the global net on the test images if due, record and save the round; return a line about it."""
        if self.strategy.is_scored(server_round):
            self._row["test_accuracy"] = self._score()
        self.rows.append(self._row)
        tensors = prefixed(MODEL, self.model) | prefixed(STRATEGY, self.strategy.state())
        self.store.save(server_round, Checkpoint(tensors, {"rows": self.rows, "settings": self._settings()}))
        return round_line(self.rows[-1], self.federation.settings.rounds)

    def _score(self) -> float:
        federation, net = self.federation, self.strategy.net
        fill(net, self.model)
        found = accuracy(
            net, federation.splits.test, federation.splits, federation.config.data, federation.device
        )  # fmt: skip
        if found is None:
            raise ValueError("the data set has no test images to score on; add some")
        return found


def round_line(row: dict[str, Any], rounds: int) -> str:
    """Return a round in one line.

    Args:
        row: Of the record.
        rounds: How many there are.
    """
    name = f"round {row['round']}/{rounds}" if row["round"] else "calibration by clients"
    parts = [f"{len(row['weights'])} of {len(row['clients'])} clients"]
    parts += [f"loss {row['loss']:.4f}"] if "loss" in row else []
    parts += [f"{key.removesuffix('_accuracy')} {percent(row[key])}" for key in ("val_accuracy", "test_accuracy")
              if key in row]  # fmt: skip
    parts.append(f"{row['bytes_down'] / 1e6:.2f} MB down, {row['bytes_up'] / 1e6:.2f} MB up")
    return f"{name}: {', '.join(parts)}"
