"""Where a training runs: on one device, or on several that take a share of every batch each."""

__all__: list[str] = []
