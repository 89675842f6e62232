"""What low-bit training reads and changes inside a student: weight codes, statistics, precision, initial weights."""

__all__: list[str] = []
