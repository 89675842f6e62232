"""Written files made to fit another runtime; no output changes."""

__all__: list[str] = []
