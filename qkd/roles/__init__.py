"""What a role is in a run: its nets, its start, its agent, its images, and how its training is put together."""

__all__: list[str] = []
