"""The arithmetic of a training, precision and memory format: as requested, or chosen by a short race."""

__all__: list[str] = []
