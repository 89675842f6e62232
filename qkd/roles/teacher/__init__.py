"""The teacher of a run: trained, taken from a file, or copied from another run."""

__all__: list[str] = []
