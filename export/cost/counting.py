"""Count what a network costs: parameters, multiply-accumulates, bit operations, weight bytes, activation memory.

The bit operations (BOPs) of a layer are ``multiply-accumulates * weight bits * activation bits``.

References:
    van Baalen et al., `Bayesian Bits <https://arxiv.org/abs/2005.07093>`_, 2020, supplementary material (BOP count);
    qonnx's inference cost counts the same. Baskin et al., `UNIQ <https://arxiv.org/abs/1804.10969>`_, 2018, add the
    width of the accumulator, which is left out here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import fx, nn

from export.cost.program import (
    FLOAT_BITS,
    LayerFacts,
    Peak,
    Program,
    activation_peak,
    float_bytes,
    packed_bytes,
    program_of_view,
    stored_bytes,
)
from export.cost.reading import program_of_file
from quantizers.integer import IntegerView

if TYPE_CHECKING:
    from quantizers import Student

SCALAR_BYTES = 4  # a bias is int32, a scale float32


@dataclass(frozen=True)
class LayerCost:
    """What one convolution or linear layer costs, for one image.

    Args:
        name, kind: The layer, and ``conv`` or ``linear``.
        output_shape: Without the batch.
        parameters: Weights and biases.
        macs: Multiply-accumulates.
        weight_bits, input_bits: Widths of its weights and of its input.
        bops: Bit operations.
        weight_bytes: Its weights at their bits.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    weight_bits: int
    input_bits: int
    bops: int
    weight_bytes: int


@dataclass(frozen=True)
class Totals:
    """What a whole network costs, for one image.

    Args:
        parameters: Weights and biases.
        macs: Multiply-accumulates of its layers.
        bops: Bit operations.
        weight_bytes: Weights alone, at their bits.
        parameter_bytes: Weights at their bits, and four bytes for each bias and each weight scale: the minimum size of
            the network without the graph. (Scales of activations, four bytes per grid, are left out.)
        peak_stored_bytes: Largest activation memory if codes are stored as bytes and real values in float32.
        peak_packed_bytes: The same if everything takes only its bits, and the image is stored as codes.
        peak_at: Operation that runs at the former.
    """

    parameters: int
    macs: int
    bops: int
    weight_bytes: int
    parameter_bytes: int
    peak_stored_bytes: int
    peak_packed_bytes: int
    peak_at: str


@dataclass(frozen=True)
class CostReport:
    """What a student costs, and its float twin: the same layers and biases with 32 bits everywhere.

    Args:
        name: What was counted.
        student: The totals.
        float_twin: Those of the twin.
        layers: Convolutions and linear layers in order.
        file_bytes: Size of the file; None if there is none.
    """

    name: str
    student: Totals
    float_twin: Totals
    layers: tuple[LayerCost, ...]
    file_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values, and each of the twin's totals over the student's as ``ratios``."""
        student, twin = asdict(self.student), asdict(self.float_twin)
        ratios = {key: twin[key] / value for key, value in student.items() if isinstance(value, int) and value}
        return {**asdict(self), "ratios": ratios}


def cost_of_view(view: IntegerView, input_shapes: Sequence[tuple[int, ...]], *, name: str = "student") -> CostReport:
    """Return the cost of an integer view.

    Args:
        view: What the student computes.
        input_shapes: A shape for each input, batch first; the cost is that of one image whatever the batch.
        name: Shown to users.

    Returns:
        Parameters, operations and bytes of the net and of each layer, for one image.

    Raises:
        ValueError: If the shapes do not fit the view.
    """
    return cost_of_program(program_of_view(view, input_shapes), name=name)


def cost_of_student(student: nn.Module, *, name: str = "student") -> CostReport:
    """Return the cost of a student that ``quantizers.prepare`` made, for images of the size it was prepared for.

    Args:
        student: The student; scales do not matter, but must exist.
        name: Shown to users.

    Returns:
        Parameters, operations and bytes of the net and of each layer, for one image.

    Raises:
        TypeError: If it is not a student, or its parameters are not float32.
        quantizers.NotCalibratedError: If the student has not been calibrated.
        ValueError: If a bias does not fit int32 or a scale is not finite (names the layer).
    """
    from quantizers import integer_view

    if not isinstance(student, fx.GraphModule):
        raise TypeError(f"cost_of_student takes what quantizers.prepare made, got {type(student).__name__}")
    view = integer_view(cast("Student", student))
    shapes = [tuple(node.meta["shape"]) for node in student.graph.nodes if node.op == "placeholder"]
    return cost_of_view(view, shapes, name=name)


def cost_of_file(path: str | PathLike[str]) -> CostReport:
    """Return the cost of an ONNX file: one that ``export_onnx`` wrote in any flavor, or of a float net.

    The file is not run, and neither its target nor qonnx is needed. Batch norm costs nothing, as runtimes fold it.
    Everything but the activation peaks is what ``cost_of_student`` gives; these differ where a file needs several
    operators for one function (SiLU), whose intermediate results count here.

    Args:
        path: The ONNX file.

    Returns:
        Parameters, operations and bytes of the net and of each layer, for one image.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not an ONNX file, or its sizes cannot be determined.
        OSError: If it cannot be read.
    """
    return cost_of_program(program_of_file(path), name=Path(path).name, file_bytes=Path(path).stat().st_size)


def cost_of_program(program: Program, *, name: str, file_bytes: int | None = None) -> CostReport:
    """Return the cost of a program; the last step of the other functions.

    Args:
        program: Operations and edges, for one image.
        name: Shown to users.
        file_bytes: Size of the file in bytes, or None if there is no file.

    Returns:
        Parameters, operations and bytes of the net and of each layer.
    """
    facts = [(step.name, step.layer) for step in program.operations if step.layer is not None]
    layers = tuple(_layer(name, layer) for name, layer in facts)
    return CostReport(name, _totals(program, layers), _float_totals(program), layers, file_bytes)


def _layer(name: str, facts: LayerFacts) -> LayerCost:
    return LayerCost(
        name=name,
        kind=facts.kind,
        output_shape=facts.output_shape,
        parameters=facts.weights + facts.biases,
        macs=facts.macs,
        weight_bits=facts.weight_bits,
        input_bits=facts.input_bits,
        bops=facts.macs * facts.weight_bits * facts.input_bits,
        weight_bytes=-(-facts.weights * facts.weight_bits // 8),
    )


def _totals(program: Program, layers: Sequence[LayerCost]) -> Totals:
    facts = [step.layer for step in program.operations if step.layer is not None]
    weight_bytes = sum(layer.weight_bytes for layer in layers)
    stored = activation_peak(program, stored_bytes)
    return Totals(
        parameters=sum(layer.parameters for layer in layers),
        macs=sum(layer.macs for layer in layers),
        bops=sum(layer.bops for layer in layers),
        weight_bytes=weight_bytes,
        parameter_bytes=weight_bytes + SCALAR_BYTES * sum(layer.biases + layer.weight_scales for layer in facts),
        peak_stored_bytes=stored.size_bytes,
        peak_packed_bytes=activation_peak(program, packed_bytes, packs_inputs=True).size_bytes,
        peak_at=stored.operation,
    )


def _float_totals(program: Program) -> Totals:
    facts = [step.layer for step in program.operations if step.layer is not None]
    macs, weights = sum(layer.macs for layer in facts), sum(layer.weights for layer in facts)
    parameters = weights + sum(layer.biases for layer in facts)
    peak: Peak = activation_peak(program, float_bytes, is_float=True)
    return Totals(
        parameters=parameters,
        macs=macs,
        bops=macs * FLOAT_BITS * FLOAT_BITS,
        weight_bytes=4 * weights,
        parameter_bytes=4 * parameters,
        peak_stored_bytes=peak.size_bytes,
        peak_packed_bytes=peak.size_bytes,
        peak_at=peak.operation,
    )
