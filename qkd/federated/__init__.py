"""Federated distillation: clients that keep their images train one low-bit student, and a server averages."""

from qkd.federated.averaging import UnlikeStatesError, average_states
from qkd.federated.engines.server import Server
from qkd.federated.engines.worker import Worker
from qkd.federated.federation import Federation
from qkd.federated.messages import Order, Reply
from qkd.federated.partition import dirichlet_shares, divide

__all__ = [
    "Federation",
    "Order",
    "Reply",
    "Server",
    "UnlikeStatesError",
    "Worker",
    "average_states",
    "dirichlet_shares",
    "divide",
]
