"""Joint distillation and domain adaptation: teacher and student learn from labeled and unlabeled images."""

__all__: list[str] = []
