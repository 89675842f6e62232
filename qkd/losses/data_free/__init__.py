"""Losses for synthesizing images from a teacher. No real images are read."""

__all__: list[str] = []
