"""What `import qkd` offers: whole runs, finished ones, distillation in your own loop."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qkd.api.distilling import Distilled, distill
    from qkd.api.losses import loss
    from qkd.api.running import Run, load_run, run
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = ["Distilled", "Run", "distill", "load_run", "loss", "run"]
