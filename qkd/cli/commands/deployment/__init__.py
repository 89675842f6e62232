"""Sub-commands about what goes to devices: the low-bit execution provider."""

__all__: list[str] = []
