"""Sub-commands for training other than `qkd run`."""

__all__: list[str] = []
