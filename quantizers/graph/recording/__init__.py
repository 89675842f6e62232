"""Runs a float network and records what it computes."""

__all__: list[str] = []
