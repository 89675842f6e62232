"""What low-bit trainings read and move inside a student: codes of weights, statistics, precision, another start."""

__all__: list[str] = []
