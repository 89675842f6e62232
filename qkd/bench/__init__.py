"""Measuring models on devices: the named models, the selected devices, and the record of each device."""

__all__: list[str] = []
