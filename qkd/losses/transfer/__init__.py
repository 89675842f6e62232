"""Losses for domain adaptation, for very many classes, and for how steep a net's blocks are."""

__all__: list[str] = []
