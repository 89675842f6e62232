"""Data-free distillation: images are made from the teacher, and no real images are read."""

__all__: list[str] = []
