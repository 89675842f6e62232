"""Compare an exported graph with the student it came from, image by image and layer by layer.

``ParityError(RuntimeError)`` is raised by ``ParityReport.raise_if_worse`` and carries the report.
"""

from export.parity.check import check_parity
from export.parity.layers import LayerParity
from export.parity.report import Comparison, ParityError, ParityReport
from export.parity.with_provider import ProviderLayer, ProviderParity

__all__ = [
    "Comparison",
    "LayerParity",
    "ParityError",
    "ParityReport",
    "ProviderLayer",
    "ProviderParity",
    "check_parity",
]
