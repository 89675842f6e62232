"""From a float network to the graph of a student: tracing, one canonical spelling, the plan of grids, the rewriting."""

from quantizers.graph.rewrite import prepare
from quantizers.graph.trace import RewriteError

__all__ = ["RewriteError", "prepare"]
