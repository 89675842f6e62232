"""The operations that augment a batch: draws, engine, look-up tables, index maps."""

__all__: list[str] = []
