"""How weights are stored in a file, and what a file says about itself."""

__all__: list[str] = []
