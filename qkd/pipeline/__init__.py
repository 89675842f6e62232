"""The stages of an experiment in order."""

from qkd.pipeline.running import run_stages

__all__ = [
    "run_stages",
]
