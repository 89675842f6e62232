"""Sub-commands, one per module: `add` declares the options, the rest runs the command."""

__all__: list[str] = []
