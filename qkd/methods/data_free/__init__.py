"""Data-free distillation: images are made out of the teacher, and no real one is read."""

__all__: list[str] = []
