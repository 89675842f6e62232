"""MetaDistil: a quiz teaches the teacher to teach."""

__all__: list[str] = []
