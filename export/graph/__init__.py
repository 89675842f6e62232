"""Parts of an ONNX graph: the builder of nodes and constants, and the shape of every edge."""

__all__: list[str] = []
