"""The canonical form: the closed set of modules and kinds that spell every net, and how others are refused."""

__all__: list[str] = []
