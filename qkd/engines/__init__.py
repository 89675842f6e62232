"""The devices of a training: one, or several that each take a share of every batch."""

__all__: list[str] = []
