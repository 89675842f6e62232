"""Images inverted from a teacher, one batch at a time, and the pool that keeps them on disk."""

__all__: list[str] = []
