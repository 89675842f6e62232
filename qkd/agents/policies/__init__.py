"""Policies and schedules as values, and their files."""

__all__: list[str] = []
