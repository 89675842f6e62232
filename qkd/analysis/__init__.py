"""Looks at what runs made: finished nets, their features and costs, schedules; nothing is trained."""

__all__: list[str] = []
