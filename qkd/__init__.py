"""Teacher, low-bit student, ONNX, parity, latency: the stages, their parts and the command line.

Shapes are written with one vocabulary throughout: ``batch``, ``channels``, ``height``, ``width``, ``classes``;
scalars are ``[]``. Images are ``[batch, channels, height, width]``. Accuracies are fractions from 0 to 1.

The parts are imported from their own modules (``from qkd.config.binding import load_config``), so that
``qkd --help`` stays quick.
"""

from qkd import moved as moved

__all__: list[str] = []
