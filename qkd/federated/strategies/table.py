"""The strategies by name, each with a server side and a client side."""

from __future__ import annotations

from typing import NamedTuple

from qkd.federated.strategies.class_logits import ClassLogits, ClassLogitsObjective
from qkd.federated.strategies.latents import Latents, LatentsObjective
from qkd.federated.strategies.proximal import ProximalObjective
from qkd.federated.strategies.strategy import Objective, Strategy


class Halves(NamedTuple):
    """A strategy: what its server does, and what its clients minimize."""

    server: type[Strategy]
    client: type[Objective]


STRATEGIES = {
    "fedavg": Halves(Strategy, Objective),
    "fedprox": Halves(Strategy, ProximalObjective),
    "feddistill": Halves(ClassLogits, ClassLogitsObjective),
    "fedgen": Halves(Latents, LatentsObjective),
}
