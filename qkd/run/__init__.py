"""The run folder: what identifies a run, and its files. Calling the package calls :func:`qkd.api.run`."""

from qkd.api.rooms import callable_room

callable_room(__name__)
__all__: list[str] = []
