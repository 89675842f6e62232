"""Comparison of runs: their figures side by side, and which differences are more than noise."""

__all__: list[str] = []
