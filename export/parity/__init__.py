"""Compare an exported graph with the student it came from, image by image and layer by layer.

``ParityError(RuntimeError)`` is raised by ``ParityReport.raise_if_worse`` and carries the report.
"""

from export.parity.check import check_parity
from export.parity.layers import LayerParity
from export.parity.report import Comparison, ParityError, ParityReport

__all__ = ["Comparison", "LayerParity", "ParityError", "ParityReport", "check_parity"]
