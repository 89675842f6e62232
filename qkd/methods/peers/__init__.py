"""A student ensemble: nets that learn beside the student, and from each other."""

__all__: list[str] = []
