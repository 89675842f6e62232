"""Showing that one recording is enough: the same each time, for any number of images, with the same gradients."""

__all__: list[str] = []
