"""Low-bit arithmetic on Brevitas: rewrites a float CNN into a trainable student and gives its integer view."""

from quantizers.calibrate import calibrate, freeze_batch_norm, quantizer_scales
from quantizers.graph.rewrite import prepare
from quantizers.graph.trace import RewriteError
from quantizers.integer import Grid, IntegerView
from quantizers.kernels import fake_quantize, fake_quantize_per_channel, is_fused, set_fused
from quantizers.names import QUANTIZERS
from quantizers.records import is_grid_record, require_same_grids
from quantizers.settle import settle
from quantizers.spec import QuantSpec
from quantizers.student import Student, act_quantizers, quant_layers
from quantizers.tensor_quant import NotCalibratedError
from quantizers.view import integer_view, layer_report

__all__ = [
    "QUANTIZERS",
    "Grid",
    "IntegerView",
    "NotCalibratedError",
    "QuantSpec",
    "RewriteError",
    "Student",
    "act_quantizers",
    "calibrate",
    "fake_quantize",
    "fake_quantize_per_channel",
    "freeze_batch_norm",
    "integer_view",
    "is_fused",
    "is_grid_record",
    "layer_report",
    "prepare",
    "quant_layers",
    "quantizer_scales",
    "require_same_grids",
    "set_fused",
    "settle",
]
