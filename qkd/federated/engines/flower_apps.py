"""Our strategy and client in terms of Flower's message API: a `Strategy`, a `ServerApp` and a `ClientApp`."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy as FlowerBase
from torch import Tensor

from qkd.config import RunConfig
from qkd.data import load_splits
from qkd.federated.engines.server import Server
from qkd.federated.engines.worker import Worker
from qkd.federated.federation import Federation
from qkd.federated.messages import Answer, Order, Reply
from qkd.federated.strategies import FederationError
from qkd.progress import Progress
from qkd.training import cpu_threads

ARRAYS, METRICS, ORDER = "arrays", "metrics", "order"  # names of records in a message
START_S, POLL_S = 120.0, 0.2  # time limit for clients to appear, and the polling interval
PARTITION = "partition-id"  # Flower's key for a client's number, in its simulation
# Errors that a client's own code raised. After any other, a process is gone, which Flower keeps using: whichever
# clients it is given to would be left out, one after another, for the rest of the run.
OF_CLIENTS = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.LOAD_CLIENT_APP_EXCEPTION)


def server_app(server: Server, progress: Progress, failures: list[BaseException], stop: threading.Event) -> ServerApp:
    """Return the app that runs the remaining rounds.

    Args:
        server: The run's server.
        progress: Gets one line per round.
        failures: Gets the error that ends the app, which Flower would only log.
        stop: Set when the simulation has ended, for whatever reason; the app then stops waiting for replies, which its
            thread would do forever.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
        _stop_waiting(grid, stop)
        try:
            with cpu_threads(server.federation.config.threads or 1):  # Flower runs this in a separate thread
                rounds = server.rounds()
                strategy = FlowerStrategy(
                    server, nodes_by_client(grid, server.federation.settings.clients), rounds.start
                )
                strategy.start(
                    grid,
                    initial_arrays=arrays_of(server.model),
                    num_rounds=len(rounds),
                    evaluate_fn=lambda number, _: strategy.close_round(number, progress),
                )
        except BaseException as error:
            failures.append(error)
            raise

    return app


def _stop_waiting(grid: Grid, stop: threading.Event) -> None:
    pull = grid.pull_messages

    def pull_unless_stopped(message_ids: Iterable[str]) -> Iterable[Message]:
        if stop.is_set():
            raise FederationError("the simulation has ended before all clients answered")
        answered: Iterable[Message] = pull(message_ids)
        return answered

    grid.pull_messages = pull_unless_stopped


def client_app(config: str, answer: Answer) -> ClientApp:
    """Return the app of a client.

    Args:
        config: The run's config, as JSON.
        answer: The function that does the work.
    """
    app = ClientApp()

    def work(message: Message, context: Context) -> Message:
        reply = answer(config, order_of(message, int(context.node_config[PARTITION])))
        content = RecordDict({ARRAYS: arrays_of(reply.tensors), METRICS: MetricRecord(dict(reply.metrics))})
        return Message(content, reply_to=message)

    def introduce(message: Message, context: Context) -> Message:
        number = MetricRecord({PARTITION: int(context.node_config[PARTITION])})
        return Message(RecordDict({METRICS: number}), reply_to=message)

    app.train()(work)
    app.evaluate()(work)
    app.query()(introduce)
    return app


def answer_order(config: str, order: Order) -> Reply:
    """Carry out an order of the server in the current process; the images are loaded once per process."""
    made = _worker(config)
    with cpu_threads(made.federation.config.threads or 1):
        return made.answer(order)


@functools.lru_cache(maxsize=1)
def _worker(config: str) -> Worker:
    run = RunConfig.model_validate_json(config)
    return Worker(Federation(run, load_splits(run.data, seed=run.seed), torch.device("cpu")))


class FlowerStrategy(FlowerBase):  # type: ignore[misc]
    """Our strategy as a Flower strategy.

    Args:
        server: Holds the strategy, and the record of the rounds.
        nodes: Client -> Flower's number of its node.
        first: Our number of Flower's round 1, since our rounds may begin with a calibration, or resume.
    """

    def __init__(self, server: Server, nodes: Mapping[int, int], first: int) -> None:
        self.server, self.first = server, first
        self.nodes, self.clients = dict(nodes), {node: client for client, node in nodes.items()}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid  # noqa: ARG002
    ) -> Iterable[Message]:  # fmt: skip
        """Return one message per client of the round."""
        self.server.model = tensors_of(arrays)
        return [
            self._message(order, MessageType.TRAIN) for order in self.server.configure_train(self._ours(server_round))
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new global net, and the clients' mean loss."""
        self.server.aggregate_train(self._ours(server_round), [self._reply(reply) for reply in replies])
        return arrays_of(self.server.model), None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid  # noqa: ARG002
    ) -> Iterable[Message]:  # fmt: skip
        """Return one message per client that scores."""
        orders = self.server.configure_evaluate(self._ours(server_round))
        return [self._message(order, MessageType.EVALUATE) for order in orders]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Record the clients' scores."""
        self.server.aggregate_evaluate(self._ours(server_round), [self._reply(reply) for reply in replies])
        return None

    def summary(self) -> None:
        """Print nothing, since the run has already introduced itself."""

    def close_round(self, server_round: int, progress: Progress) -> None:
        """Score, record and save a round; Flower also calls this for round 0, before the first one."""
        if server_round:
            progress.say(self.server.close_round(self._ours(server_round)))

    def _ours(self, server_round: int) -> int:
        return server_round + self.first - 1

    def _message(self, order: Order, kind: str) -> Message:
        facts = ConfigRecord({"task": order.task, "round": order.server_round})
        content = RecordDict({ARRAYS: arrays_of(order.tensors), ORDER: facts})
        return Message(content, dst_node_id=self.nodes[order.client], message_type=kind)

    def _reply(self, message: Message) -> Reply:
        client = self.clients[message.metadata.src_node_id]
        if message.has_error():
            lines = str(message.error.reason).strip().splitlines() or [f"error {message.error.code}"]
            if message.error.code not in OF_CLIENTS:
                raise FederationError(
                    f"a process of the simulation was lost with the order of client {client} ({lines[0]}); was it "
                    "short of memory? The round is not saved: the same command resumes with it (federated.workers says "
                    "how many processes there are)"
                )
            return Reply(client, error=lines[-1])
        metrics = {name: float(value) for name, value in message.content[METRICS].items()}
        return Reply(client, tensors_of(message.content[ARRAYS]), metrics)


def nodes_by_client(grid: Grid, clients: int) -> dict[int, int]:
    """Return Flower's number of each client's node; nodes are queried, since Flower may order them in any way.

    Args:
        grid: Flower's grid.
        clients: How many there will be; at first there are fewer.

    Raises:
        RuntimeError: If they do not appear, or one does not answer.
    """
    nodes, waited_s = list(grid.get_node_ids()), 0.0
    while len(nodes) < clients:
        if waited_s >= START_S:
            raise RuntimeError(f"only {len(nodes)} of {clients} clients appeared within {START_S:.0f} s")
        time.sleep(POLL_S)
        nodes, waited_s = list(grid.get_node_ids()), waited_s + POLL_S
    asked = [Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
    found: dict[int, int] = {}
    for reply in grid.send_and_receive(asked):
        if reply.has_error():
            raise RuntimeError(f"a client of Flower's simulation did not start: {reply.error.reason}")
        found[int(reply.content[METRICS][PARTITION])] = reply.metadata.src_node_id
    return found


def order_of(message: Message, client: int) -> Order:
    """Return the order in a message."""
    facts: Any = message.content[ORDER]
    return Order(client, facts["task"], int(facts["round"]), tensors_of(message.content[ARRAYS]))


def arrays_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as a Flower record, bit for bit."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def tensors_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a Flower record."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}
