"""What a correct file of a student holds and how far its logits may be off, read from the student alone.

Nothing here is read from the file: a file that names a wider step, or fewer quantizers, is not believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import numpy.typing as npt
from torch import fx, nn

from export.lowering.model import INPUT, last_edge, output_names, output_step
from quantizers import Student, integer_view
from quantizers.integer import Conv, IntegerView, Linear, Node, Quantize

# Half a step of the logits: below it, both logits round to the same integer sum.
LOGIT_STEPS = 0.5
# Float arithmetic sums the last layer's products in float32. Each of two such sums is off by about one rounding (2^-24)
# of the largest sum that the layer can reach; ResNet-50 (2,048 products) reached 0.6 of a step.
ROUNDINGS = 2
UNIT_ROUNDOFF = 2.0**-24
# Logits that end in a real function (say, a sigmoid) have no step; two libraries agree up to the last bits.
FUNCTION_ROUNDING = 2.0**-16
# Optimizations on: a kernel may round a tie the other way, so that the last layer sees another code.
CODES_ON = 1

Outputs = list[npt.NDArray[np.float32]] | str  # or why there are none


@dataclass(frozen=True)
class Tap:
    """One call of a quantizer.

    Args:
        name: Module path.
        scale: Real size of a code, as a float32 value.
        low, high: Codes of the grid.
    """

    name: str
    scale: float
    low: int
    high: int


@dataclass(frozen=True)
class Expected:
    """A student's quantizers and the tolerance of its logits.

    Args:
        taps: Every call of a quantizer, in order of computation.
        outputs: Names of its outputs in a file, in the student's order; the first are the logits.
        output_step: Real size of one step of the first output; None if it has none.
        rounding: Real size of float32's rounding in the first output; None if it has no step.
        move: How far one code of the last layer's input can move a logit, in steps.
    """

    taps: tuple[Tap, ...]
    outputs: tuple[str, ...]
    output_step: float | None
    rounding: float | None
    move: float

    def tie(self, logits: npt.NDArray[np.float32]) -> float:
        """Return how far apart two logits may be and still be equal up to rounding."""
        return 2 * self._rounding(logits)

    def allowed(self, logits: npt.NDArray[np.float32], *, optimized: bool) -> float:
        """Return how far apart logits of the same function may be.

        Args:
            logits: The student's, any shape.
            optimized: Whether the other side ran with optimizations on.
        """
        half = LOGIT_STEPS * (self.output_step or 0.0)
        moved = CODES_ON * self.move * (self.output_step or 0.0) if optimized else 0.0
        return half + moved + self._rounding(logits)

    @property
    def of_other_outputs(self) -> Expected:
        """The tolerance for the outputs after the first one, whose step is unknown."""
        return replace(self, output_step=None, rounding=None)

    def _rounding(self, logits: npt.NDArray[np.float32]) -> float:
        largest = float(np.abs(logits).max(initial=0, where=np.isfinite(logits)))
        if self.rounding is None:
            return FUNCTION_ROUNDING * largest
        return self.rounding + ROUNDINGS * UNIT_ROUNDOFF * largest


def incomparable(ours: Sequence[npt.NDArray[np.float32]], theirs: Outputs) -> str:
    """Return why a student's outputs cannot be compared with others; empty if they can."""
    if isinstance(theirs, str):
        return theirs
    if len(ours) != len(theirs):
        return f"the student gives {len(ours)} outputs, the file {len(theirs)}"
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        if one.shape != other.shape:
            name = "logits are" if number == 1 else f"output {number} is"
            return f"{name} {list(one.shape)} in the student, {list(other.shape)} in the file"
        if not one.size:
            return f"output {number} is empty: {list(one.shape)}"
    return ""


def view_of(student: nn.Module) -> IntegerView:
    """Return a student's integer view.

    Raises:
        ValueError: If it is not a calibrated student, or has a scale that is not finite.
    """
    if not isinstance(student, fx.GraphModule):
        raise ValueError(f"compare a student that quantizers.prepare made, got {type(student).__name__}")
    return integer_view(cast(Student, student))


def expected_of(view: IntegerView) -> Expected:
    """Return what a correct file of the view's student holds."""
    step, last = output_step(view), _last(view)
    reach, move = _reach(last, view) if isinstance(last, (Conv, Linear)) else (0.0, 1.0)
    taps = (Tap(node.name, float(np.float32(node.grid.scale)), node.grid.low, node.grid.high)
            for node in view.nodes if isinstance(node, Quantize))  # fmt: skip
    rounding = None if step is None else ROUNDINGS * UNIT_ROUNDOFF * reach * step
    return Expected(tuple(taps), tuple(output_names(view, [INPUT])), step, rounding, move)


def _last(view: IntegerView) -> Node | None:
    """Return what computes the first output, ignoring moves of values; None if that is already on a grid."""
    edge, maker = last_edge(view)
    return None if edge in view.grids else maker


def _reach(layer: Conv | Linear, view: IntegerView) -> tuple[float, float]:
    """Return the largest sum that a layer can reach, and its largest weight, both in steps of the coarsest channel."""
    grid = view.grids[layer.inputs[0]]
    weights = np.abs(layer.weights.astype(np.float64)).reshape(len(layer.weights), -1)
    scales = np.broadcast_to(layer.weight_scale.astype(np.float64).reshape(-1), (len(weights),))
    relative = scales / scales.max()
    bias = 0.0 if layer.bias is None else np.abs(layer.bias.astype(np.float64))
    sums = weights.sum(1) * max(abs(grid.low), abs(grid.high)) + bias
    return float((sums * relative).max()), float((weights.max(1) * relative).max(initial=1.0))
