"""The engine in this process: clients work one after another, and one that fails is left out of its round."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qkd.federated.engines.server import Server
from qkd.federated.messages import Order, Reply
from qkd.progress import Progress, Tracker


def run_local(server: Server, answer: Callable[[Order], Reply], progress: Progress) -> None:
    """Run the remaining rounds.

    Args:
        server: The state of the run, saved after each round.
        answer: The client side; if it raises, the client is left out.
        progress: Shows clients, rounds and time left.

    Raises:
        FederationError: If every client of a round fails.
        OSError: If a checkpoint cannot be written.
    """
    settings, left = server.federation.settings, server.rounds()
    asked = settings.clients_per_round or settings.clients
    if not left:
        return
    with progress.track(len(left) * asked, f"federated, rounds to {settings.rounds}", "clients") as tracker:
        for server_round in left:
            server.aggregate_train(server_round, _answers(server.configure_train(server_round), answer, tracker))
            scores = _answers(server.configure_evaluate(server_round), answer, Tracker())
            server.aggregate_evaluate(server_round, scores)
            progress.epoch(tracker, server.close_round(server_round))


def _answers(orders: Sequence[Order], answer: Callable[[Order], Reply], tracker: Tracker) -> list[Reply]:
    replies = []
    for order in orders:
        try:
            replies.append(answer(order))
        except Exception as error:  # if anything goes wrong at a client, the others finish the round
            replies.append(Reply(order.client, error=failure(error)))
        tracker.update(1)
    return replies


def failure(error: BaseException) -> str:
    """Return an error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
