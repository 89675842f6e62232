"""SPEQ: the student learns from itself with some activations at eight bits, sampled at every step."""

__all__: list[str] = []
