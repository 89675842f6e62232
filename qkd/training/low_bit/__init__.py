"""Rules that low-bit weights follow in training; their state is in every checkpoint, and nothing of it is exported."""

__all__: list[str] = []
