"""Commands that come before a run: a first config, completion in the shell."""

__all__: list[str] = []
