"""Run 2-bit convolutions faster than int8: an execution provider for ONNX Runtime, built where it is installed."""

from export.lowbit.build import LowBitUnavailableError
from export.lowbit.provider import PROVIDER, Availability, availability, library_path, providers, register

__all__ = [
    "PROVIDER",
    "Availability",
    "LowBitUnavailableError",
    "availability",
    "library_path",
    "providers",
    "register",
]
