"""How to express every torch operation with the closed set of modules."""

__all__: list[str] = []
