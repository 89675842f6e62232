"""Federated runs of seconds, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qkd.config import RunConfig
from qkd.config.binding import bind
from qkd.data import load_splits
from qkd.federated import Federation, Order, Server, Worker
from qkd.federated.engines import run_local
from qkd.progress import Progress, Silent
from qkd.training.checkpoint import CheckpointStore


def tiny_federated(
    data: Path, strategy: str = "fedavg", *, student: dict[str, Any] | None = None, name: str = "tiny",
    section: dict[str, Any] | None = None, **federated: Any,
) -> RunConfig:  # fmt: skip
    """Return a config of four clients and three rounds.

    Args:
        data: Folder of a small image set.
        strategy: Of the run.
        student: Further keys of its section.
        name: Of the run.
        section: Further keys of ``data``.
        **federated: Further keys of its section.
    """
    return bind({
        "name": name, "seed": 1, "threads": 1,
        "data": {"name": "npz", "path": str(data), "val_fraction": 0.25, "batch_size": 8, **(section or {})},
        "student": {"net": "lenet5_half", "quant": {"weight_bits": 4, "act_bits": 4}, "calibration_batches": 1,
                    **(student or {})},
        "federated": {"strategy": strategy, "clients": 4, "alpha": 1.0, "rounds": 3, "local_steps": 2, "lr": 0.05,
                      **federated},
    })  # fmt: skip


def federation_of(config: RunConfig) -> Federation:
    """Return the run of a config."""
    return Federation(config, load_splits(config.data, seed=config.seed), torch.device("cpu"))


def server_of(config: RunConfig, folder: Path, progress: Progress | None = None) -> Server:
    """Return the server of a config, which keeps its checkpoints in a folder."""
    store = CheckpointStore(folder / "checkpoint", lambda _: None)
    return Server(federation_of(config), store, progress or Silent())


def trained(
    config: RunConfig, folder: Path, fails: Any = lambda order: None, progress: Progress | None = None
) -> Server:
    """Return the server after the rounds that are left.

    Args:
        config: Of the run.
        folder: Of its checkpoints.
        fails: Called with each order before it is done; may raise.
        progress: Where to talk.
    """
    server = server_of(config, folder, progress)
    worker = Worker(server.federation)

    def answer(order: Order) -> Any:
        fails(order)
        return worker.answer(order)

    server.resume()
    run_local(server, answer, Silent())
    return server
