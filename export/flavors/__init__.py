"""The flavors of graph that one lowering writes, and how each stores codes, weights and biases."""

from export.flavors.base import Flavor, without_custom_operators
from export.flavors.ort import OrtFlavor
from export.flavors.plain import QcdqFlavor
from export.flavors.quant_nodes import QUANT_DOMAIN, QonnxFlavor
from export.flavors.table import FLAVORS, find_flavor
from export.moved import by_old_spelling

__getattr__ = by_old_spelling(__name__)
__all__ = [
    "FLAVORS",
    "QUANT_DOMAIN",
    "Flavor",
    "OrtFlavor",
    "QcdqFlavor",
    "QonnxFlavor",
    "find_flavor",
    "without_custom_operators",
]
