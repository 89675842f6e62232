"""Plain distillation: a student beside a fixed teacher, its loss a weighted sum of terms."""

__all__: list[str] = []
