"""Progressive widths: the student is trained in other widths first, e.g. at 4 bits before 2."""

__all__: list[str] = []
