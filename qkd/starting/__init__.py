"""A first config: what a folder of images contains, and the few lines that train on it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.starting.looking import Look, look_at
    from qkd.starting.writing import FirstConfig, first_config
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = ["FirstConfig", "Look", "first_config", "look_at"]
