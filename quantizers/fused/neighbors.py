"""Tells a student's layers which quantizers are next to them, where nothing comes between."""

from __future__ import annotations

from collections import Counter

from torch import fx

from quantizers.layers import ActQuantizer, QuantConvBn2d


def introduce_neighbors(student: fx.GraphModule) -> None:
    """Let each convolution know the quantizer it reads, and the one that reads it if nobody else does.

    Args:
        student: Its graph calls modules.
    """
    called = [node for node in student.graph.nodes if node.op == "call_module"]
    calls = Counter(str(node.target) for node in called)
    once = {node: student.get_submodule(str(node.target)) for node in called if calls[str(node.target)] == 1}
    for node, layer in once.items():
        if not isinstance(layer, QuantConvBn2d) or len(node.args) != 1:
            continue
        before, readers = once.get(node.args[0]), list(node.users)
        if isinstance(before, ActQuantizer):
            layer.read_from(before)
        reader = once.get(readers[0]) if len(readers) == 1 and len(readers[0].args) == 1 else None
        if isinstance(reader, ActQuantizer):
            layer.hand_to(reader)
