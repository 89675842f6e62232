"""Sub-commands about images that a run has made."""

__all__: list[str] = []
