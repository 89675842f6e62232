"""Methods of distillation, a folder each: what a method checks, which nets it brings, its step and its results."""

__all__: list[str] = []
