"""Co-study: teacher and student learn from each other on the same batch."""

__all__: list[str] = []
