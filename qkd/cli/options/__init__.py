"""Shared by sub-commands: options, values among the arguments, loading and printing."""

__all__: list[str] = []
