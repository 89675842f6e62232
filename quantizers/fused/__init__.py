"""Fused parts of a training step that span several modules of a student, on CPU in channels_last."""

__all__: list[str] = []
