"""From a float network to the graph of a student: recording, spelling, planning grids, rewriting, verifying."""

from quantizers.graph.rewrite import prepare
from quantizers.graph.trace import RewriteError

__all__ = ["RewriteError", "prepare"]
