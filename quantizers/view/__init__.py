"""The integer view of a student: weights, scales and zero points as the deployed arithmetic uses them."""

from quantizers.view.building import integer_view, layer_report
from quantizers.view.modules import VIEWERS, grid_of

__all__ = ["VIEWERS", "grid_of", "integer_view", "layer_report"]
