"""How images are made: generators, what they are judged by, and the sources that give them to a training."""

__all__: list[str] = []
