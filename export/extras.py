"""How to get the packages that only some flavors need."""

from __future__ import annotations

QONNX = "pip install 'qkd-toolkit[qonnx]' (Python 3.11 or newer)"
TENSORBOARD = "pip install 'qkd-toolkit[tensorboard]'"
COMPLETION = "pip install 'qkd-toolkit[completion]'"
