"""A student ensemble: nets that learn with the student, and from each other."""

__all__: list[str] = []
