"""The canonical form: the closed set of modules and kinds that every net is spelled with, and how it is refused."""

__all__: list[str] = []
