"""The error of this package: images, labels or files that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """Images or labels that cannot be used; the message names the file or array, what was found, and how to fix it."""
