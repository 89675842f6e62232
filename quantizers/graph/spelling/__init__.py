"""How every operation of torch is written with the closed set of modules."""

__all__: list[str] = []
