"""How many bits each part of a student has, and which quantizers it uses."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WEIGHT_METHODS = ("lsq", "stats", "dorefa")
ACT_METHODS = ("lsq", "pact", "dorefa")
OVERRIDE_KEYS = ("weight_bits", "act_bits")
MIN_BITS, MAX_BITS = 2, 8
# Widths by name. `fast`: those that the low-bit execution provider of `export.lowbit` looks up, and 8 bits wherever
# fewer are not worth it; docs/fast_students.md has the measurement.
PRESETS: Mapping[str, Mapping[str, int]] = {
    "fast": {"weight_bits": 2, "act_bits": 2, "first_bits": 8, "last_bits": 8, "sum_bits": 8},
}


@dataclass(frozen=True)
class QuantSpec:
    """Bits and quantizers of a student.

    Args:
        weight_bits: Bits of weights, 2 to 8.
        act_bits: Bits of the inputs of convolutions and linear layers, 2 to 8.
        first_bits: Bits of weights and input of the layers that see the image; None for the same as the others.
        last_bits: Bits of weights and input of the layers that produce the output; None for the same as the others.
        sum_bits: Bits of the operands and results of residual sums and products, and of the inputs of average pooling.
            The literature leaves the skip path at 32 bits; eight are enough, and integer kernels use 8 bits anyway.
        weight_quantizer: ``lsq`` (learned step sizes), ``stats`` (step sizes from their statistics) or ``dorefa``.
        act_quantizer: ``lsq``, ``pact`` or ``dorefa``; for the inputs of low-bit layers. Sums, pools and the image are
            always on learned step sizes.
        per_channel: One weight step size per output channel (not for ``dorefa``), or one per tensor.
        symmetric: Whether no grid is shifted: images and the values of real functions are on signed grids, which cover
            as much below zero as above, so that no quantizer has a zero point. FINN requires that.
        overrides: Layer name pattern (``fnmatch``: ``layer1.*``) -> ``{"weight_bits": 4, "act_bits": 4}``; for each
            key the last pattern that matches wins, even over the first and last layer.

    Raises:
        ValueError: If a bit width is not an integer from 2 to 8, a quantizer is unknown, or an override has another key
            or is not a mapping.
    """

    weight_bits: int = 4
    act_bits: int = 4
    first_bits: int | None = 8
    last_bits: int | None = 8
    sum_bits: int = 8
    weight_quantizer: str = "lsq"
    act_quantizer: str = "lsq"
    per_channel: bool = True
    symmetric: bool = False
    overrides: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "act_bits", "sum_bits"):
            _check_bits(name, getattr(self, name))
        for name in ("first_bits", "last_bits"):
            if getattr(self, name) is not None:
                _check_bits(name, getattr(self, name))
        _check_choice("weight_quantizer", self.weight_quantizer, WEIGHT_METHODS)
        _check_choice("act_quantizer", self.act_quantizer, ACT_METHODS)
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides must map layer names to bits, got {self.overrides!r}")
        for pattern, values in self.overrides.items():
            if not isinstance(pattern, str):
                raise ValueError(f"overrides: a layer's name must be text, such as {str(pattern)!r}, got {pattern!r}")
            if not isinstance(values, Mapping):
                raise ValueError(
                    f"overrides[{pattern!r}] must be a mapping such as {{'weight_bits': 4}}, got {values!r}"
                )
            for key, bits in values.items():
                _check_choice(f"overrides[{pattern!r}]", key, OVERRIDE_KEYS)
                _check_bits(f"overrides[{pattern!r}].{key}", bits)

    @classmethod
    def preset(cls, name: str, **others: Any) -> QuantSpec:
        """Return the bits of a named preset.

        Args:
            name: ``fast``: the fastest students on processors where the low-bit execution provider helps (see
                ``export.lowbit``), as long as narrower parts do not cost more accuracy than they save time.
            others: Further arguments; a width among them overrides the preset's.

        Returns:
            The bits and quantizers.

        Raises:
            ValueError: If no preset has the name, or an argument is out of range.

        Example:
            >>> spec = QuantSpec.preset("fast", per_channel=False)
            >>> spec.code, spec.sum_bits, spec.per_channel
            ('w2a2', 8, False)
        """
        _check_choice("preset", name, tuple(PRESETS))
        return cls(**{**PRESETS[name], **others})

    @property
    def code(self) -> str:
        """Return the short name of the widths, such as ``w2a2``."""
        return f"w{self.weight_bits}a{self.act_bits}"

    def layer_bits(self, name: str, *, is_first: bool, is_last: bool) -> tuple[int, int]:
        """Return (weight bits, bits of the input) of the layer at module path ``name``."""
        weight, act = self.weight_bits, self.act_bits
        for applies, bits in ((is_first, self.first_bits), (is_last, self.last_bits)):
            if applies and bits is not None:
                weight, act = bits, bits
        for pattern, values in self.overrides.items():
            if fnmatch.fnmatchcase(name, pattern):
                weight, act = values.get("weight_bits", weight), values.get("act_bits", act)
        return weight, act

    def unused_overrides(self, names: list[str]) -> list[str]:
        """Return the override patterns that match none of the layer ``names``."""
        return [pattern for pattern in self.overrides if not fnmatch.filter(names, pattern)]


def _check_bits(name: str, bits: object) -> None:
    if not isinstance(bits, int) or isinstance(bits, bool) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name} must be an integer from {MIN_BITS} to {MAX_BITS}, got {bits!r}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
