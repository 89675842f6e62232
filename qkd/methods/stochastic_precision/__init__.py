"""SPEQ: the student learns from itself with some activations at eight bits, drawn at every step."""

__all__: list[str] = []
