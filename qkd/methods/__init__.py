"""Distillation methods, one folder each: a method's checks, nets, step and results."""

__all__: list[str] = []
