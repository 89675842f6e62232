"""Student -> ONNX, proof of equality, latency.

Takes an ``nn.Module`` or a file, never a run folder. ONNX Runtime is imported when a function first needs it.
Errors: ``ExportError(ValueError)`` (nothing was written), ``ParityError(RuntimeError)`` (carries the report),
``DeviceError(RuntimeError)`` (a device could not be reached, lacks something, or failed).
"""

from typing import TYPE_CHECKING

from export import moved as moved

if TYPE_CHECKING:
    from export.checks import ExportError
    from export.conversion.repack import repack
    from export.cost import CostReport, LayerCost, Totals, cost_of_file, cost_of_student, cost_of_view
    from export.devices import Device, DeviceError, DeviceResult, LatencyReport, Settings, measure_devices
    from export.devices.latency import measure_interleaved, measure_latency
    from export.models.float_twin import export_float
    from export.models.int8_baseline import export_int8_baseline
    from export.models.student import ExportedLayer, ExportedModel, export_onnx, write_view
    from export.parity import (
        Comparison,
        LayerParity,
        ParityError,
        ParityReport,
        ProviderLayer,
        ProviderParity,
        check_parity,
    )
    from export.sample import Sample, expect, read_sample, sample_size, write_sample
    from export.storage.preprocessing import Preprocessing, read_preprocessing
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = [
    "Comparison",
    "CostReport",
    "Device",
    "DeviceError",
    "DeviceResult",
    "ExportError",
    "ExportedLayer",
    "ExportedModel",
    "LatencyReport",
    "LayerCost",
    "LayerParity",
    "ParityError",
    "ParityReport",
    "Preprocessing",
    "ProviderLayer",
    "ProviderParity",
    "Sample",
    "Settings",
    "Totals",
    "check_parity",
    "cost_of_file",
    "cost_of_student",
    "cost_of_view",
    "expect",
    "export_float",
    "export_int8_baseline",
    "export_onnx",
    "measure_devices",
    "measure_interleaved",
    "measure_latency",
    "read_preprocessing",
    "read_sample",
    "repack",
    "sample_size",
    "write_sample",
    "write_view",
]
