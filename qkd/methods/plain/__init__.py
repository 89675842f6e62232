"""Plain distillation: a student with a fixed teacher, and a weighted sum of terms as its loss."""

__all__: list[str] = []
