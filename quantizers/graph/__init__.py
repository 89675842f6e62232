"""From a float network to the graph of a student: recording, spelling, plan of grids, rewriting, guard."""

from quantizers.graph.rewrite import prepare
from quantizers.graph.trace import RewriteError

__all__ = ["RewriteError", "prepare"]
