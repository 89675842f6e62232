"""Sub-commands of trainings that are no `qkd run`."""

__all__: list[str] = []
