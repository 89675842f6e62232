"""An auxiliary teacher: a net between teacher and student."""

__all__: list[str] = []
