"""Quantizers by name, in Brevitas' grammar: ``Int2WeightPerChannelLsq``, ``Uint4ActPerTensorPact``, ..."""

from __future__ import annotations

from typing import Any

from brevitas.inject import ExtendedInjector, value
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
from torch import Tensor, nn

from quantizers.computed import DorefaWeightQuant, StatsWeightQuant
from quantizers.tensor_quant import (
    DorefaActQuant,
    LsqActQuant,
    LsqWeightQuant,
    PactActQuant,
    code_range,
)

BITS = range(2, 9)


class _KeepsQuantizer:
    """Loads a state into the existing quantizer. Brevitas builds a new one, which would lose shared step sizes."""

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # type: ignore[arg-type]


class _WeightProxy(_KeepsQuantizer, WeightQuantProxyFromInjector):  # type: ignore[misc]
    pass


class _ActProxy(_KeepsQuantizer, ActQuantProxyFromInjector):  # type: ignore[misc]
    pass


class _Weight(ExtendedInjector):  # type: ignore[misc]
    proxy_class = _WeightProxy
    signed = True
    narrow_range = False
    has_norm = True

    @value  # type: ignore[untyped-decorator]
    def low(bit_width: int) -> int:  # noqa: N805
        return code_range(bit_width, signed=True)[0]

    @value  # type: ignore[untyped-decorator]
    def high(bit_width: int) -> int:  # noqa: N805
        return code_range(bit_width, signed=True)[1]

    @value  # type: ignore[untyped-decorator]
    def weight(tracked_parameter_list: list[Tensor]) -> Tensor:  # noqa: N805
        return tracked_parameter_list[0]


class _Act(ExtendedInjector):  # type: ignore[misc]
    proxy_class = _ActProxy
    narrow_range = False
    largest = None


_ACT_METHODS = {"Lsq": LsqActQuant, "Pact": PactActQuant, "Dorefa": DorefaActQuant}
_ACT_KINDS = {"Uint": "unsigned", "Int": "signed", "ShiftedUint": "shifted"}


def _subclass(base: Any, name: str, fields: dict[str, Any]) -> Any:
    return type(base)(name, (base,), fields)  # injectors have their own metaclass


def _weights() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for bits in BITS:
        for channel in (True, False):
            name = f"Int{bits}WeightPer{'Channel' if channel else 'Tensor'}Lsq"
            fields = {"tensor_quant": LsqWeightQuant, "bit_width": bits, "per_channel": channel}
            table[name] = _subclass(_Weight, name, fields)
            name = name.replace("Lsq", "Stats")
            table[name] = _subclass(_Weight, name, {**fields, "tensor_quant": StatsWeightQuant})
        name = f"Int{bits}WeightPerTensorDorefa"
        table[name] = _subclass(_Weight, name, {"tensor_quant": DorefaWeightQuant, "bit_width": bits})
    return table


def _activations() -> dict[str, Any]:
    table: dict[str, Any] = {}
    for bits in BITS:
        for prefix, kind in _ACT_KINDS.items():
            for method, module in _ACT_METHODS.items():
                name = f"{prefix}{bits}ActPerTensor{method}"
                fields = {"tensor_quant": module, "bit_width": bits, "kind": kind, "signed": kind == "signed"}
                table[name] = _subclass(_Act, name, fields)
    return table


QUANTIZERS: dict[str, Any] = {**_weights(), **_activations()}


def weight_quantizer(bits: int, method: str, *, per_channel: bool) -> Any:
    """Return the injector of a weight quantizer; ``method`` is ``lsq``, ``stats`` or ``dorefa`` (always per tensor)."""
    grain = "PerChannel" if per_channel and method != "dorefa" else "PerTensor"
    return QUANTIZERS[f"Int{bits}Weight{grain}{method.capitalize()}"]


def act_quantizer(bits: int, method: str, kind: str) -> Any:
    """Return the injector of an activation quantizer; ``kind`` is ``unsigned``, ``signed`` or ``shifted``."""
    prefix = next(prefix for prefix, meaning in _ACT_KINDS.items() if meaning == kind)
    return QUANTIZERS[f"{prefix}{bits}ActPerTensor{method.capitalize()}"]
