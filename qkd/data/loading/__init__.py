"""Data sets by name: load them, check them, and identify them by hashes of their content."""

__all__: list[str] = []
