"""Low-bit arithmetic on Brevitas: rewrites a float CNN into a trainable student and builds its integer view.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from quantizers import QuantSpec, calibrate, prepare, quant_layers
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> images = torch.rand(16, 1, 8, 8)
    >>> student = prepare(net, QuantSpec(weight_bits=2, act_bits=2, first_bits=4), images)
    >>> calibrate(student, images.split(8))
    >>> {name: layer.quant.bits for name, layer in quant_layers(student).items()}
    {'0': 4, '3': 8}
    >>> student(images).shape
    torch.Size([16, 2])
"""

from quantizers.calibrate import calibrate, freeze_batch_norm, quantizer_scales, reestimate_batch_norm
from quantizers.graph.rewrite import prepare
from quantizers.graph.trace import RewriteError
from quantizers.integer import Grid, IntegerView
from quantizers.kernels import fake_quantize, fake_quantize_per_channel, is_fused, set_fused
from quantizers.names import QUANTIZERS
from quantizers.recipes.shadow import batch_statistics, unquantized
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
    "batch_statistics",
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
    "reestimate_batch_norm",
    "require_same_grids",
    "set_fused",
    "settle",
    "unquantized",
]
