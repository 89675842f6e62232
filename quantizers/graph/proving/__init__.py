"""Checks that one recording is enough: same result each time, for any number of images, with the same gradients."""

__all__: list[str] = []
