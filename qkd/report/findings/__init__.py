"""What a report says before its tables: a verdict, classes that are confused, pictures, terms."""

__all__: list[str] = []
