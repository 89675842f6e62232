"""The run folder: what a run is, and its files; called, the room is :func:`qkd.api.run`."""

from qkd.api.rooms import callable_room

callable_room(__name__)
__all__: list[str] = []
