"""Measure ONNX files on this machine and on devices behind ssh or adb.

Error: ``DeviceError(RuntimeError)``: a device could not be reached, lacks something, or failed.
"""

from export.devices.connections.address import Device, DeviceError, as_device
from export.devices.fleet import DeviceResult, measure_devices
from export.devices.measuring import Settings, measure_on, probe_device
from export.devices.probing import Probe
from export.devices.report import LatencyReport

__all__ = [
    "Device",
    "DeviceError",
    "DeviceResult",
    "LatencyReport",
    "Probe",
    "Settings",
    "as_device",
    "measure_devices",
    "measure_on",
    "probe_device",
]
