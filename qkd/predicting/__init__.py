"""Use exported files: classify single images, score a data set, and a standalone program for other machines."""

__all__: list[str] = []
