"""The flavours of graph that one lowering writes, and how each stores codes, weights and biases."""

from export.flavours.base import Flavour, without_custom_operators
from export.flavours.ort import OrtFlavour
from export.flavours.plain import QcdqFlavour
from export.flavours.quant_nodes import QUANT_DOMAIN, QonnxFlavour
from export.flavours.table import FLAVOURS, find_flavour

__all__ = [
    "FLAVOURS",
    "QUANT_DOMAIN",
    "Flavour",
    "OrtFlavour",
    "QcdqFlavour",
    "QonnxFlavour",
    "find_flavour",
    "without_custom_operators",
]
