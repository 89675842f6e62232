"""Teacher, low-bit student, ONNX, parity, latency: the stages, their parts and the command line.

In Python: ``qkd.run(config)`` runs an experiment, ``qkd.load_run(folder)`` opens one, ``qkd.distill(student, teacher,
batches)`` trains with losses of configs, ``qkd.loss(name)`` is one of them.

Shapes are written with one vocabulary throughout: ``batch``, ``channels``, ``height``, ``width``, ``classes``;
scalars are ``[]``. Images are ``[batch, channels, height, width]``. Accuracies are fractions from 0 to 1.

The parts are imported from their own modules (``from qkd.config.binding import load_config``), so that
``qkd --help`` stays quick.
"""

from typing import TYPE_CHECKING

from qkd import moved as moved

if TYPE_CHECKING:
    from qkd.api.losses import loss
    from qkd.api.rooms import distill, run
    from qkd.api.running import load_run
    from qkd.api.version import __version__
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = ["__version__", "distill", "load_run", "loss", "run"]
