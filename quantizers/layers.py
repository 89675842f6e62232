"""The modules of a student: Brevitas layers that know their input's grid, and the operations between them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import brevitas.nn as qnn
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from quantizers.fused import batch_norm, coded_conv
from quantizers.kernels import compiled_for, round_straight_through
from quantizers.tensor_quant import ActQuant, LsqWeightQuant, NotCalibratedError, WeightQuant

if TYPE_CHECKING:
    from quantizers.graph.form.origins import Origin

# Biases are limited to 30 bits and sign, so that bias plus accumulated products fits in int32.
BIAS_LIMIT = float(2**29)
LEAST_SCALE = 1e-12


class ActQuantizer(qnn.QuantIdentity):  # type: ignore[misc]
    """Puts a tensor on a grid. On an unsigned grid the clip at zero is the ReLU, so no separate one runs.

    Args:
        injector: A class of :data:`quantizers.names.QUANTIZERS`.
        name: Module path, for messages.
        largest: Upper end of the real range where the float net bounds it (6 for ReLU6), else None.
    """

    def __init__(self, injector: Any, name: str, largest: float | None = None) -> None:
        super().__init__(act_quant=injector, return_quant_tensor=False, largest=largest)
        self.act_quant.skip_create_quant_tensor = True
        self.name = name
        self.origin: Origin | None = None
        self._given: Tensor | None = None
        self._latest: weakref.ref[Tensor] | None = None

    @property
    def quant(self) -> ActQuant:
        """Return the arithmetic inside."""
        return self.act_quant.fused_activation_quant_proxy.tensor_quant  # type: ignore[no-any-return]

    def grid_for(self, x: Tensor) -> batch_norm.Grid | None:
        """Return the grid, for a layer that quantizes ``x`` itself; None if this module must see it first."""
        if batch_norm.is_watched(self) or batch_norm.is_watched(self.act_quant) or not _is_plain(self.act_quant):
            return None
        return self.quant.grid_for(x)

    def give(self, values: Tensor) -> Tensor:
        """Return values that are already on the grid, which the next call passes through."""
        self._given = values
        return values

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled: nothing of a forward pass, which may have been interrupted."""
        return {**self.__dict__, "_given": None, "_latest": None}

    def is_source_of(self, x: Tensor) -> bool:
        """Return whether ``x`` is the result of the latest call, on the current grid."""
        return self._latest is not None and self._latest() is x

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - Brevitas' name
        given, self._given = self._given, None
        out = input if given is input else self._quantized(input)
        is_on_grid = self.training and self.quant.is_plain and _is_plain(self.act_quant)
        self._latest = weakref.ref(out) if is_on_grid else None
        return out

    def _quantized(self, x: Tensor) -> Tensor:
        try:
            if _is_plain(self.act_quant):
                return self.quant.values(x)
            return self.act_quant(x)  # type: ignore[no-any-return]
        except NotCalibratedError:
            raise NotCalibratedError(self.name) from None


def _is_plain(proxy: Any) -> bool:
    """Return whether a Brevitas proxy would only call its quantizer; its layers of calls cost as much as a kernel."""
    return not (proxy.export_mode or proxy.disable_quant or not proxy.is_quant_enabled)


class _Deployable:
    """What a convolution and a linear layer share: their own batch norm, folded scales, int32 biases."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    bn: nn.modules.batchnorm._BatchNorm | None
    mask: Tensor | None  # where weights are not zero for good (pruning); None if all train
    weight_quant: Any
    training: bool
    name: str

    def _attach(self, bn: nn.modules.batchnorm._BatchNorm | None) -> None:
        self.weight_quant.skip_create_quant_tensor = True
        self.quant.follow(self)  # type: ignore[arg-type]
        self.bn = bn
        self.deployed_in_training = False
        self.name = ""  # module path, for messages
        self._source: tuple[ActQuantizer, ...] = ()
        self._consumers: tuple[ActQuantizer, ...] = ()

    @property
    def source(self) -> ActQuantizer:
        """Return the quantizer whose grid the input is on."""
        return self._source[0]

    @property
    def consumers(self) -> tuple[ActQuantizer, ...]:
        """Return the quantizers that read the output."""
        return self._consumers

    def connect(self, *, source: ActQuantizer | None = None, consumers: tuple[ActQuantizer, ...] | None = None) -> None:
        """Set the layer's neighbors (kept in tuples, so that they are not registered as submodules)."""
        if source is not None:
            self._source = (source,)
        if consumers is not None:
            self._consumers = consumers

    @property
    def quant(self) -> WeightQuant:
        """Return the arithmetic of the weights."""
        return self.weight_quant.tensor_quant  # type: ignore[no-any-return]

    def _sign(self) -> Tensor | None:
        """Return 1 or -1 per channel, shaped like the weights: the sign of batch norm's factor (None if all are 1)."""
        if self.bn is None or self.bn.weight is None:
            return None
        factor = self.bn.weight
        can_ask = type(factor) in (Tensor, nn.Parameter) and factor.device.type == "cpu"  # a GPU would have to wait
        if can_ask and not torch.compiler.is_compiling() and not factor.detach().min().item() < 0:
            return None
        sign = torch.where(self.bn.weight.detach() < 0, -1.0, 1.0).to(self.weight.dtype)
        return sign.reshape((-1,) + (1,) * (self.weight.dim() - 1))

    def turned(self, values: Tensor) -> Tensor:
        """Return values with flipped sign in the channels that are quantized with flipped sign; an involution.

        Args:
            values: Shaped like the weights: weights, codes, or differences of either.
        """
        sign = self._sign()
        return values if sign is None else values * sign

    def low_bit_weight(self) -> Tensor:
        """Return the weight on its grid; differentiable.

        The grid reaches one code further down than up. Folding a negative batch-norm factor flips the sign of that
        channel's weights, so they are quantized with flipped sign: the folded codes then fit the same bits.
        """
        sign = self._sign()  # computed once per step
        weight = self._on_grid(self.weight) if sign is None else self._on_grid(self.weight * sign) * sign
        return weight if self.mask is None else weight * self.mask

    def _on_grid(self, weight: Tensor) -> Tensor:
        if _is_plain(self.weight_quant):
            return self.quant.values(weight)
        return self.weight_quant(weight)  # type: ignore[no-any-return]

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Return batch norm's factor ``[channels]`` and the real bias after it ``[channels]`` (None means 1 and 0)."""
        if self.bn is None:
            return None, self.bias
        mean, var = self.bn.running_mean, self.bn.running_var
        if mean is None or var is None:
            raise ValueError("batch norm without running statistics cannot be folded; set track_running_stats=True")
        factor = torch.rsqrt(var + self.bn.eps)
        factor = factor if self.bn.weight is None else factor * self.bn.weight
        shift = -mean * factor if self.bn.bias is None else self.bn.bias - mean * factor
        return factor, shift if self.bias is None else shift + self.bias * factor

    def folded(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the signed factor on the weights, the positive weight scale and the real bias, each ``[channels]``.

        The scale of a dead channel (batch-norm factor near zero) has a floor, so that its bias fits int32; its weights
        then add less than ``2**-29`` of the bias per unit.
        """
        factor, shift = self._affine()
        step = self.quant.step.reshape(-1)
        if factor is None and shift is None:
            return None, step, None
        scale = step if factor is None else step * factor.abs()
        if shift is not None:
            floor = shift.detach().abs() / (BIAS_LIMIT * self.source.quant.step.detach())
            needed = floor.max() if scale.numel() == 1 else floor  # a per-tensor scale must fit every bias
            floored = torch.maximum(scale, needed)
        else:
            floored = scale
        floored = floored.clamp_min(LEAST_SCALE)
        if factor is None:
            # exactly 1 where the scale is unchanged; checking for that would wait for a GPU
            changed = torch.where(floored == scale, torch.ones_like(step), floored / step)
            return changed, floored, shift
        sign = torch.where(factor < 0, -1.0, 1.0)
        return torch.where(floored == scale, factor, sign * floored / step), floored, shift

    def deployed(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias as in the exported graph; differentiable, with straight-through bias rounding."""
        weight = self.low_bit_weight()
        factor, scale, shift = self.folded()
        if factor is not None:
            weight = weight * factor.reshape((-1,) + (1,) * (weight.dim() - 1))
        if shift is None:
            return weight, None
        unit = scale * self.source.quant.step
        return weight, round_straight_through(shift / unit) * unit

    def weight_codes(self) -> Tensor:
        """Return the codes of the weight as a floating tensor, as batch norm's sign turns it; masked ones are 0."""
        codes = self.quant.codes(self.turned(self.weight))
        return codes if self.mask is None else codes * self.mask

    def integers(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return weight codes, positive weight scale ``[channels]`` or ``[1]``, and int32 bias codes (as float64)."""
        with torch.no_grad():
            codes = self.weight_codes()
            _, scale, shift = self.folded()
            if shift is None:
                return codes, scale, None
            return codes, scale, torch.round(shift / (scale * self.source.quant.step)).double()

    @torch.no_grad()
    def weight_of_codes(self, codes: Tensor) -> Tensor:
        """Return the low-bit weight with the given codes of :meth:`integers`; LSQ maps it back to the same codes.

        Args:
            codes: Integers of the grid, shaped like the weights.
        """
        return self.turned(codes.to(self.weight.dtype) * self.quant.step)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.mask is not None:  # a student of an earlier version has none: all of its weights trained
            state_dict.setdefault(f"{prefix}mask", torch.ones_like(self.mask))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]

    @property
    def uses_deployed(self) -> bool:
        """Return whether ``forward`` currently runs the deployed arithmetic."""
        return not self.training or self.deployed_in_training


class QuantConvBn2d(_Deployable, qnn.QuantConv2d):  # type: ignore[misc]
    """A 2-d convolution with low-bit weights and its batch norm.

    In training mode batch norm uses the batch; in eval mode, and after :func:`freeze_batch_norm`, the layer computes
    the same as the exported graph: batch norm folded into the weight scales, bias on the int32 grid.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d | None, injector: Any, **weight_options: Any) -> None:
        options = {f"weight_{key}": value for key, value in weight_options.items()}
        qnn.QuantConv2d.__init__(
            self, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, bias=conv.bias is not None, weight_quant=None,
        )  # fmt: skip
        _adopt(self, conv, injector, options)
        self._attach(bn)
        self._reader: tuple[ActQuantizer, ...] = ()
        self._before: tuple[ActQuantizer, ...] = ()

    def read_from(self, before: ActQuantizer) -> None:
        """Set the quantizer that directly produces the input, so that training mode can multiply its codes."""
        self._before = (before,)

    def hand_to(self, reader: ActQuantizer) -> None:
        """Set the quantizer that is the only reader of the output: in training mode it may get values on its grid.

        Batch norm and grid are then one pass, and the quantizer passes its input through.
        """
        self._reader = (reader,)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - Brevitas' name
        if self.uses_deployed:
            return self._conv_forward(input, *self.deployed())  # type: ignore[no-any-return]
        out = self._multiplied(input)
        return out if self.bn is None else self._normalized(out, self.bn)

    def _multiplied(self, x: Tensor) -> Tensor:
        weight = self.low_bit_weight()
        if not self._has_codes(x) or not coded_conv.takes(x, self):
            return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]
        steps = self._before[0].quant.step, self.quant.step
        return coded_conv.coded_conv(x, weight, *steps, self, compiled_for)

    def _has_codes(self, x: Tensor) -> bool:
        """Return whether input and weights are codes of two to four bits times known steps."""
        if not self._before or not self._before[0].is_source_of(x) or not _is_plain(self.weight_quant):
            return False
        before, own = self._before[0].quant, self.quant
        is_known = type(own) is LsqWeightQuant and not own.bypass and before.kind == "unsigned"
        return is_known and max(before.bits, own.bits) <= coded_conv.MOST_BITS

    def _normalized(self, out: Tensor, bn: nn.Module) -> Tensor:
        if not batch_norm.takes(out, bn):
            return bn(out)  # type: ignore[no-any-return]
        grid = None if not self._reader or batch_norm.is_watched(self) else self._reader[0].grid_for(out)
        values = batch_norm.batch_norm(out, bn, compiled_for, grid)  # type: ignore[arg-type]
        return values if grid is None else self._reader[0].give(values)


class QuantLinearBn(_Deployable, qnn.QuantLinear):  # type: ignore[misc]
    """A fully connected layer with low-bit weights and its batch norm; modes as in :class:`QuantConvBn2d`.

    With a batch norm it only accepts ``[batch, features]``: batch norm works on axis 1, but with more axes the features
    of a linear layer are last.

    Raises:
        ValueError: If the batch norm is for images or volumes, or has another number of features.
    """

    def __init__(self, linear: nn.Linear, bn: nn.BatchNorm1d | None, injector: Any, **weight_options: Any) -> None:
        if isinstance(bn, (nn.BatchNorm2d, nn.BatchNorm3d)) or (bn and bn.num_features != linear.out_features):
            raise ValueError(
                f"{type(bn).__name__}({bn.num_features}) after Linear({linear.in_features}, {linear.out_features}) "
                "works on axis 1 and not on its features, so it cannot be folded in; give the layer None, and make the "
                "batch norm a separate layer"
            )
        options = {f"weight_{key}": value for key, value in weight_options.items()}
        qnn.QuantLinear.__init__(
            self, linear.in_features, linear.out_features, bias=linear.bias is not None, weight_quant=None
        )
        _adopt(self, linear, injector, options)
        self._attach(bn)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - Brevitas' name
        if self.bn is not None and input.dim() != 2:
            raise ValueError(
                f"{self.name or 'a linear layer'}: its batch norm works on axis 1, but on an input with {input.dim()} "
                f"axes ({list(input.shape)}) its features are last; flatten to [batch, features] before the layer"
            )
        if self.uses_deployed:
            return F.linear(input, *self.deployed())
        out = F.linear(input, self.low_bit_weight(), self.bias)
        return out if self.bn is None else self.bn(out)


def _adopt(layer: Any, original: nn.Conv2d | nn.Linear, injector: Any, options: dict[str, Any]) -> None:
    """Adopt the float weights first, then build the quantizer, whose step size is initialized from them.

    Frozen parameters of the float network stay frozen. The step size of a frozen weight is frozen, too, as it would
    change the weight that the student computes with. (Batch norm is the original module, with its own flags and running
    statistics; step sizes of activations do not belong to a layer, and are learned.)
    """
    layer.weight = _adopted(original.weight)
    if original.bias is not None:
        layer.bias = _adopted(original.bias)
    qnn.mixin.QuantWeightMixin.__init__(layer, injector, **options)
    if not original.weight.requires_grad:
        layer.quant.requires_grad_(False)
    mask = original._buffers.get("mask")
    layer.register_buffer("mask", None if mask is None else mask.clone())
    layer.to(original.weight.device)


def _adopted(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


class Sum(nn.Module):
    """Sum of two tensors on grids of the same scale."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Product(nn.Module):
    """Product of two tensors on grids."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Concat(nn.Module):
    """Concatenation of tensors on the same grid.

    Args:
        axis: Dimension along which they are joined.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, self.axis)


class GlobalAveragePool(nn.Module):
    """Mean over height and width.

    Args:
        keepdims: Whether the result is ``[batch, channels, 1, 1]``, else ``[batch, channels]``.
    """

    def __init__(self, *, keepdims: bool) -> None:
        super().__init__()
        self.keepdims = keepdims

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=self.keepdims)


class Probabilities(nn.Module):
    """The softmax at the end of a network: in training mode the student returns logits, which losses expect.

    In eval mode, and so in the exported file, it returns the same as the float network.

    Args:
        axis: Dimension of the classes.
        is_log: Whether the result is logarithms.
    """

    def __init__(self, axis: int, *, is_log: bool) -> None:
        super().__init__()
        self.axis, self.is_log = axis, is_log

    @property
    def function(self) -> str:
        """Return the name of the function in the integer view."""
        return "log_softmax" if self.is_log else "softmax"

    def forward(self, logits: Tensor) -> Tensor:
        if self.training:
            return logits
        return F.log_softmax(logits, self.axis) if self.is_log else F.softmax(logits, self.axis)


class WindowGather(nn.Module):
    """Repeats rows and columns so that uneven adaptive pooling windows become even ones; only moves values.

    Args:
        rows: Source row of each output row.
        columns: Source column of each output column.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: list[int], columns: list[int]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.tensor(rows), persistent=False)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(2, self.rows).index_select(3, self.columns)
