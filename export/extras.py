"""How to get the packages that only some flavors need."""

from __future__ import annotations

QONNX = "pip install 'qkd-toolkit[qonnx]' (Python 3.11 or newer)"
