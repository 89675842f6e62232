"""What a report says before its tables: a verdict, classes that are confused, pictures, terms, runs compared."""

__all__: list[str] = []
