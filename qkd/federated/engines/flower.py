"""The engine under Flower: its simulation on Ray runs our clients, and the server stays in this process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading

from qkd.federated.engines.server import Server
from qkd.federated.messages import Answer
from qkd.progress import Progress
from qkd.training import cpu_threads

HINT = "install the extra: pip install 'qkd-toolkit[flower]', or use federated.engine=local"


def run_flower(server: Server, progress: Progress, answer: Answer | None = None) -> None:
    """Run the remaining rounds under Flower's simulation.

    Clients are Ray actors, ``federated.workers`` at a time, each with one CPU and the run's threads (1 if not
    configured); they load the images themselves. The results equal those of the local engine with as many threads.

    Args:
        server: The state of the run, saved after each round.
        progress: Gets one line per round.
        answer: The client side: maps a config as JSON and an order to a reply; None for the default. Ray sends it to
            other processes, so it must be picklable.

    Raises:
        ImportError: If Flower or Ray is not installed.
        FederationError: If every client of a round fails, or one of the processes that clients run in is lost.
        OSError: If a checkpoint cannot be written.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported
    try:
        from flwr.simulation import run_simulation

        from qkd.federated.engines.flower_apps import answer_order, client_app, server_app
    except ImportError as error:
        raise ImportError(f"federated.engine is flower, but it cannot be imported ({error}); {HINT}") from error
    settings, config = server.federation.settings, server.federation.config
    if not server.rounds():
        return
    _without_colors()
    failures: list[BaseException] = []
    stop = threading.Event()
    with contextlib.redirect_stdout(sys.stderr), cpu_threads(config.threads or 1):  # stdout is for results
        try:
            run_simulation(
                server_app=server_app(server, progress, failures, stop),
                client_app=client_app(config.model_dump_json(), answer or answer_order),
                num_supernodes=settings.clients,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": {"num_cpus": settings.workers},
                },
            )
        except Exception:
            if not failures:
                raise  # Flower's own; ours it passes on in a form that depends on its version
        finally:
            stop.set()
    if failures:
        raise failures[0]
    if server.rounds():
        raise RuntimeError("Flower's simulation ended before the last round; see its messages above")


def _without_colors() -> None:
    """Let Flower log in plain text: its escape codes would be shown as such where output is escaped or redirected."""
    for handler in logging.getLogger("flwr").handlers:
        if hasattr(handler, "colored"):
            handler.colored = False
