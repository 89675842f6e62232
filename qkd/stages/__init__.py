"""The stages of an experiment: each reads files of the run folder and writes its own."""

from qkd.stages.table import STAGES

__all__ = ["STAGES"]
