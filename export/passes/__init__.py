"""Passes over the integer view before it is written; no code changes."""

__all__: list[str] = []
