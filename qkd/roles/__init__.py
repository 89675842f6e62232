"""The roles of a run: their nets, starting weights, agents and images, and how their trainings are put together."""

__all__: list[str] = []
