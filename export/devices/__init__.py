"""Measure ONNX files on this machine and on devices behind ssh or adb.

Error: ``DeviceError(RuntimeError)``: a device could not be reached, lacks something, or failed. Its child
``PartlyMeasuredError`` carries the reports of what was measured.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.devices.connections.address import Device, DeviceError, as_device
    from export.devices.fleet import DeviceResult, measure_devices
    from export.devices.measuring import PartlyMeasuredError, Settings, measure_on, probe_device
    from export.devices.probing import Probe
    from export.devices.report import LatencyReport
else:
    from export.on_demand import on_demand

    __getattr__, __dir__ = on_demand(__name__)

__all__ = [
    "Device",
    "DeviceError",
    "DeviceResult",
    "LatencyReport",
    "PartlyMeasuredError",
    "Probe",
    "Settings",
    "as_device",
    "measure_devices",
    "measure_on",
    "probe_device",
]
