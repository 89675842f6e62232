"""Adapt written files to another runtime without changing any output."""

__all__: list[str] = []
