"""What a report shows before its tables: a verdict, confused classes, pictures, terms."""

__all__: list[str] = []
