"""Measuring models on devices: what a person names, which devices are meant, and the record of each device."""

__all__: list[str] = []
