"""A teacher that is the average of several nets."""

__all__: list[str] = []
