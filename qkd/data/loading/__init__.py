"""Data sets by name: loaded, checked, and told apart by hashes of their content."""

__all__: list[str] = []
