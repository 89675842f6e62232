"""Rules for low-bit weights in training; their state is in every checkpoint, and none of it is exported."""

__all__: list[str] = []
