"""Sub-commands, a module each: `add` declares its options, the rest is what it does with them."""

__all__: list[str] = []
