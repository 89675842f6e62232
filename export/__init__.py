"""Student -> ONNX, proof of equality, latency.

Takes an ``nn.Module`` or a file, never a run folder. ONNX Runtime is imported when a function first needs it.
Errors: ``ExportError(ValueError)`` (nothing was written), ``ParityError(RuntimeError)`` (carries the report).
"""

from export.checks import ExportError
from export.cost import CostReport, LayerCost, Totals, cost_of_file, cost_of_student, cost_of_view
from export.float_twin import export_float
from export.latency import LatencyReport, measure_interleaved, measure_latency
from export.layer_parity import LayerParity
from export.parity import Comparison, ParityError, ParityReport, check_parity
from export.student import ExportedLayer, ExportedModel, export_onnx, write_view

__all__ = [
    "Comparison",
    "CostReport",
    "ExportError",
    "ExportedLayer",
    "ExportedModel",
    "LatencyReport",
    "LayerCost",
    "LayerParity",
    "ParityError",
    "ParityReport",
    "Totals",
    "check_parity",
    "cost_of_file",
    "cost_of_student",
    "cost_of_view",
    "export_float",
    "export_onnx",
    "measure_interleaved",
    "measure_latency",
    "write_view",
]
