"""What is kept and written at the end of each epoch."""

__all__: list[str] = []
