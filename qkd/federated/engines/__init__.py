"""Where the clients of a federated run work: in this process, or under Flower."""

from qkd.federated.engines.local import run_local

__all__ = ["run_local"]
