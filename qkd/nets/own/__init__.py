"""User-defined nets: how a config spells them, how they are built, and their copies in run folders."""

__all__: list[str] = []
