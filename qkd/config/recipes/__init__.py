"""The schema of what only low-bit trainings have, and the recipes that set it."""

__all__: list[str] = []
