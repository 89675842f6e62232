"""Student -> ONNX, proof of equality, latency.

Takes an ``nn.Module`` or a file, never a run folder. ONNX Runtime is imported when a function first needs it.
Errors: ``ExportError(ValueError)`` (nothing was written), ``ParityError(RuntimeError)`` (carries the report).
"""

from export.checks import ExportError
from export.float_twin import export_float
from export.latency import LatencyReport, measure_interleaved, measure_latency
from export.layer_parity import LayerParity
from export.parity import Comparison, ParityError, ParityReport, check_parity
from export.student import ExportedLayer, ExportedModel, export_onnx, write_view

__all__ = [
    "Comparison",
    "ExportError",
    "ExportedLayer",
    "ExportedModel",
    "LatencyReport",
    "LayerParity",
    "ParityError",
    "ParityReport",
    "check_parity",
    "export_float",
    "export_onnx",
    "measure_interleaved",
    "measure_latency",
    "write_view",
]
