"""The run folder: what a run is, and its files."""

__all__: list[str] = []
