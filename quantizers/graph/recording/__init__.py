"""Running a float network and writing down what it computes."""

__all__: list[str] = []
