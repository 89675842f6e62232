"""How images are made: generators, their objectives, and the sources that feed a training."""

__all__: list[str] = []
