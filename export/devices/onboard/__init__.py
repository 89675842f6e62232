"""The one file that is copied to devices."""

__all__: list[str] = []
