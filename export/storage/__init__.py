"""How weights are stored in a file, and what a file says of itself."""

__all__: list[str] = []
