"""Losses that make images out of a teacher: no real image is read."""

__all__: list[str] = []
