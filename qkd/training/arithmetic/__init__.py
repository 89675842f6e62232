"""Which arithmetic a training runs in, precision and memory format: asked for, or chosen by a short race."""

__all__: list[str] = []
