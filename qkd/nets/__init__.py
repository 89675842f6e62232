"""Float networks by name, and their weights from and to files."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.nets.build import NETS, build_net, net_names
    from qkd.nets.near import net_hint
    from qkd.nets.weights import WeightsError, load_weights, save_weights
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = ["NETS", "WeightsError", "build_net", "load_weights", "net_hint", "net_names", "save_weights"]
