"""Strategies of federated training: FedAvg, FedProx, FedDistill, FedGen."""

from qkd.federated.strategies.strategy import Aggregate, FederationError, Objective, Strategy
from qkd.federated.strategies.table import STRATEGIES

__all__ = ["STRATEGIES", "Aggregate", "FederationError", "Objective", "Strategy"]
