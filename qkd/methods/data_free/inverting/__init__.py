"""Images that are inverted out of a teacher, a batch at a time, and the pool that keeps them on disk."""

__all__: list[str] = []
