"""HSSAKD: distillation on images in four orientations, through auxiliary branches."""

__all__: list[str] = []
