"""What sub-commands share: options, values among the arguments, loading and printing."""

__all__: list[str] = []
