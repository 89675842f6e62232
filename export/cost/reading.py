"""Read an ONNX file, of any flavor or float, as the program that its cost is counted from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from os import PathLike
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export.cost.program import FLOAT_BITS, LayerFacts, Operation, Program, Role, Value
from export.flavors import QUANT_DOMAIN, without_custom_operators
from export.runtime import load_model
from export.storage.blocked import DOMAIN as BLOCK_DOMAIN
from export.storage.blocked import OPERATOR as BLOCK_OPERATOR
from export.storage.metadata import LARGEST_AXIS, as_a_file, check_structure, read_property, read_widths
from quantizers.integer import multiply_accumulates

LAYERS = {"Conv": "conv", "ConvTranspose": "conv", "Gemm": "linear", "MatMul": "linear", BLOCK_OPERATOR: "linear"}
# They multiply by weights, or run other graphs, in ways that are not counted; none is in what this toolkit exports.
UNCOUNTED = frozenset({"Attention", "ConvInteger", "DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "MatMulInteger",
                       "QLinearConv", "QLinearMatMul", "RNN", "Scan", "SequenceMap"})  # fmt: skip
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
ALIAS_OPERATORS = frozenset({"DequantizeLinear", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Dropout",
                             "BatchNormalization"})  # fmt: skip
# Batch norm among them: runtimes fold it into the layer before it when they load a file.
MOVING_OPERATORS = ALIAS_OPERATORS | {"Concat", "MaxPool", "Transpose", "Slice", "Gather", "Pad", "Split"}
# of one constant: other nodes make another of it, of a part or of several
FORMS = frozenset({"Cast", "DequantizeLinear", "Identity", "Quant", "QuantizeLinear", "Reshape", "Transpose"})
MOVES_FIRST_INPUT = MOVING_OPERATORS - {"Concat"}


@dataclass(frozen=True)
class _Constant:
    """What is known of a tensor before the network runs: its size, the bits of a value, and how many scales it has."""

    shape: tuple[int, ...]
    bits: int
    scales: int = 0


def program_of_file(path: str | PathLike[str]) -> Program:
    """Return the program of an ONNX file for one image.

    Widths are those that ``export_onnx`` wrote with the graph. Without them, a weight's is that of its stored type or
    of its Quant, an activation's that of its Clip or Quant; eight bits after a bare QuantizeLinear.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not an ONNX file, the size of a tensor cannot be determined, or it has an operator whose
            cost is not counted, such as a recurrent layer.
    """
    model = load_model(path)
    if uncounted := sorted({node.op_type for node in model.graph.node if node.op_type in UNCOUNTED}):
        raise ValueError(
            f"{path}: the cost of {', '.join(uncounted)} is not counted, only that of layers in floats or between "
            f"QuantizeLinear and DequantizeLinear: {', '.join(sorted({*LAYERS} - {BLOCK_OPERATOR}))}"
        )
    strange = sorted({node.domain for node in model.graph.node if not _is_known(node)})
    if strange:
        raise ValueError(f"{path}: its operators from {', '.join(strange)} are unknown; cost is counted for ONNX's own")
    with as_a_file(path, "to count its cost"):
        check_structure(model)
        return _Reader(model).program()


def _is_known(node: onnx.NodeProto) -> bool:
    return node.domain in ("", QUANT_DOMAIN) or (node.domain, node.op_type) == (BLOCK_DOMAIN, BLOCK_OPERATOR)


class _Reader:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = _one_image(model)
        self.nodes = list(self.model.graph.node)
        self.shapes, self.types = _shapes(self.model)
        self.weight_bits = read_widths(model, "weight_bits")
        self.input_bits = read_widths(model, "input_bits")
        self.unused_codes = read_widths(model, "unused_codes")
        self.initializers = {entry.name: entry for entry in self.model.graph.initializer}
        self.constants = {
            entry.name: _Constant(tuple(entry.dims), _type_bits(entry.data_type))
            for entry in self.initializers.values()
        }
        taps = read_property(model, "quantizers", [])
        self.grid_bits = {str(tap["tensor"]): int(tap["bits"]) for tap in taps if "bits" in tap}
        self.same: dict[str, str] = {}  # output of a Clip that belongs to the Quant after it -> what it clips
        self.counted: set[str] = set()  # constants of layers, which several layers may share
        self.bits: dict[str, int] = {}
        self.values: dict[str, Value] = {}
        self.operations: list[Operation] = []
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def program(self) -> Program:
        inputs = tuple(entry.name for entry in self.model.graph.input if entry.name not in self.constants)
        for name in inputs:
            self._value(name, self._float_bits(name))
        for node in self.nodes:
            if node.op_type == "Constant" or (node.input and all(n in self.constants for n in node.input if n)):
                self._fold(node)
            else:
                self._run(node)
        outputs = tuple(entry.name for entry in self.model.graph.output if entry.name in self.values)
        return Program(tuple(self.operations), self.values, inputs, outputs)

    def _fold(self, node: onnx.NodeProto) -> None:
        """Record a constant that is computed from constants, as runtimes do when they load a file."""
        source = self.constants.get(node.input[0]) if node.input else None
        bits = FLOAT_BITS if source is None else source.bits
        scales = 0 if source is None else source.scales
        if node.op_type in ("DequantizeLinear", "Quant"):
            scales = prod(self.constants[node.input[1]].shape)
        if node.op_type == "Quant":
            bits = int(self._number(node.input[3]))
        for name in node.output:
            self.constants[name] = _Constant(self.shapes.get(name, ()), bits, scales)

    def _run(self, node: onnx.NodeProto) -> None:
        reads = tuple(self.same.get(name, name) for name in node.input if name and name not in self.constants)
        if self._belongs_to_a_quant(node):
            self.same[node.output[0]] = reads[0]
            return
        bits, role = self._bits(node, reads), self._role(node)
        layer = self._layer_facts(node)
        for name in node.output:
            if name:
                self._value(name, bits)
                self.operations.append(Operation(node.name or name, role, reads, name, layer))

    def _role(self, node: onnx.NodeProto) -> Role:
        if node.op_type in ALIAS_OPERATORS or (node.op_type == "Concat" and len(node.input) == 1):
            return "alias"
        if node.op_type == "QuantizeLinear" and self._is_joined(node.input[0]):
            return "alias"
        if node.op_type == "Clip" and self._clips_codes(node):
            made = self.operations[-1] if self.operations else None
            follows = made is not None and made.output == node.input[0] and made.role == "quantize"
            return "alias" if follows and len(self.readers[node.input[0]]) == 1 else "compute"
        return "quantize" if node.op_type in ("QuantizeLinear", "Quant") else "compute"

    def _belongs_to_a_quant(self, node: onnx.NodeProto) -> bool:
        """Return whether a node is the Clip of a shifted grid: only a Quant reads it."""
        after = self.readers.get(node.output[0], [])
        return node.op_type == "Clip" and len(after) == 1 and after[0].op_type == "Quant"

    def _is_joined(self, name: str) -> bool:
        """Return whether a value is a concatenation of codes that is only put on their own grid again (flavor qcdq)."""
        made = self.makers.get(name)
        is_joined = made is not None and made.op_type == "Concat" and len(made.input) > 1
        return is_joined and self.bits[name] < FLOAT_BITS and len(self.readers[name]) == 1

    def _bits(self, node: onnx.NodeProto, reads: Sequence[str]) -> int:
        """Return the width of what a node makes."""
        if node.op_type == "QuantizeLinear":
            return self.unused_codes.get(node.output[0]) or self._clipped_bits(node) or 8
        if node.op_type == "Quant":
            return self.grid_bits.get(node.output[0]) or int(self._number(node.input[3]))
        if node.op_type == "Clip" and self._clips_codes(node):
            return self._width(node)
        if node.op_type in MOVES_FIRST_INPUT:
            return self.bits[reads[0]]
        if node.op_type == "Concat":
            return max(self.bits[name] for name in reads)
        return self._float_bits(next(filter(None, node.output), ""))

    def _float_bits(self, name: str) -> int:
        return FLOAT_BITS // 2 if self.types.get(name) in HALVES else FLOAT_BITS

    def _clipped_bits(self, node: onnx.NodeProto) -> int | None:
        """Return the width that the Clip after a QuantizeLinear leaves, if it is the only reader."""
        after = self.readers.get(node.output[0], [])
        return self._width(after[0]) if len(after) == 1 and after[0].op_type == "Clip" else None

    def _width(self, clip: onnx.NodeProto) -> int:
        return int(self._number(clip.input[2]) - self._number(clip.input[1])).bit_length()

    def _clips_codes(self, node: onnx.NodeProto) -> bool:
        bounds = [self.initializers.get(name) for name in node.input[1:3]]
        return len(bounds) == 2 and all(
            entry is not None and entry.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) for entry in bounds
        )

    def _layer_facts(self, node: onnx.NodeProto) -> LayerFacts | None:
        if node.op_type == BLOCK_OPERATOR:
            return self._blocked_layer(node)
        return self._layer(node) if node.op_type in LAYERS else None

    def _blocked_layer(self, node: onnx.NodeProto) -> LayerFacts:
        """Return the facts of a layer whose weights are stored in blocks, each with a sentinel that is not a weight."""
        source = node.input[0]
        while self.makers[source].op_type != "Cast":  # of the codes, before sentinels were added
            source = self.makers[source].input[0]
        (unit,) = (name for reader in self.readers[node.output[0]] for name in reader.input if name in self.constants)
        shape = self._shape(source)  # rows of features
        features = shape[-1]
        bias = self.constants.get(node.input[5]) if len(node.input) > 5 else None
        return LayerFacts(
            kind=LAYERS[BLOCK_OPERATOR],
            weights=features * self._outputs(node),
            weight_bits=int(self.weight_bits[node.name]),
            biases=0 if bias is None else prod(bias.shape),
            weight_scales=prod(self.constants[unit].shape),
            input_bits=int(self.input_bits[node.name]),
            macs=multiply_accumulates((*shape[:-1], self._outputs(node)), (features,)),
            output_shape=(self._outputs(node),),
        )

    def _outputs(self, node: onnx.NodeProto) -> int:
        return int(next(entry.i for entry in node.attribute if entry.name == "N"))

    def _layer(self, node: onnx.NodeProto) -> LayerFacts | None:
        place = 1 if node.input[1] in self.constants or node.op_type != "MatMul" else 0
        weight = self.constants.get(node.input[place])
        if weight is None:
            return None  # a product of two activations
        bias = node.input[2] if len(node.input) > 2 else self._added(node)
        output = self._shape(node.output[0])
        settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        # what one output value sums up: a kernel over the channels of its group, or a row of features
        if node.op_type == "Conv" or settings.get("transB", 0):
            summed = weight.shape[1:]
        elif place == 0:
            summed = weight.shape[-1:]
        else:
            summed = weight.shape[-2:-1] or weight.shape
        macs = multiply_accumulates(output, summed)
        if node.op_type == "ConvTranspose":  # each position of the input is multiplied by every kernel that reads it
            macs = prod(self._shape(node.input[0])[2:]) * prod(weight.shape)
        is_new = self._is_new(node.input[place])
        return LayerFacts(
            kind=LAYERS[node.op_type],
            weights=prod(weight.shape) if is_new else 0,
            weight_bits=int(self.weight_bits.get(node.name, weight.bits)),
            biases=prod(self.constants[bias].shape) if bias in self.constants and self._is_new(bias) else 0,
            weight_scales=weight.scales if is_new else 0,
            input_bits=self.bits[node.input[1 - place]],
            macs=macs,
            output_shape=output[1:],
        )

    def _added(self, node: onnx.NodeProto) -> str:
        """Return the constant that is added to a product of rows as its bias; empty if there is none."""
        after = self.readers.get(node.output[0], [])
        if node.op_type != "MatMul" or len(after) != 1 or after[0].op_type != "Add":
            return ""
        features = self._shape(node.output[0])[-1]
        known = [name for name in after[0].input if name in self.constants]
        return next((name for name in known if prod(self.constants[name].shape) == features), "")

    def _is_new(self, name: str) -> bool:
        """Return whether no layer before has the constant that this one is made of."""
        while (maker := self.makers.get(name)) is not None and maker.op_type in FORMS:
            name = maker.input[0]
        is_new = name not in self.counted
        self.counted.add(name)
        return is_new

    def _value(self, name: str, bits: int) -> None:
        self.bits[name] = bits
        self.values[name] = Value(prod(self._shape(name)), bits)

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise ValueError(f"the size of the tensor {name!r} is unknown; export with fixed sizes (the batch apart)")
        if any(not 0 <= size <= LARGEST_AXIS for size in self.shapes[name]):
            raise ValueError(f"the tensor {name!r} would have the shape {self.shapes[name]}, which no tensor can have")
        return self.shapes[name]

    def _number(self, name: str) -> float:
        if name not in self.initializers:
            raise ValueError(f"{name!r} sets a width, but is not a constant")
        return float(np.asarray(numpy_helper.to_array(self.initializers[name])).reshape(()))


def _one_image(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model whose batch is 1, with what was inferred for another batch removed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    constants = {entry.name for entry in copy.graph.initializer}
    for entry in copy.graph.input:
        if entry.name not in constants and entry.type.tensor_type.shape.dim:
            entry.type.tensor_type.shape.dim[0].dim_value = 1
    for entry in copy.graph.output:
        entry.type.tensor_type.ClearField("shape")
    return copy


def _shapes(model: onnx.ModelProto) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, int]]:
    """Return the shapes of tensors whose every size is known, and the element types of all."""
    try:
        inferred = onnx.shape_inference.infer_shapes(without_custom_operators(model), data_prop=True).graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError) as error:
        raise ValueError(f"its shapes do not fit each other ({error})") from error
    shapes = {entry.name: tuple(entry.dims) for entry in inferred.initializer}
    for entry in (*inferred.input, *inferred.value_info, *inferred.output):
        dims: Any = entry.type.tensor_type.shape.dim
        known = entry.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
        if known:
            shapes[entry.name] = tuple(dim.dim_value for dim in dims)
    types = {entry.name: entry.type.tensor_type.elem_type
             for entry in (*inferred.input, *inferred.value_info, *inferred.output)}  # fmt: skip
    return shapes, types


def _type_bits(element_type: int) -> int:
    """Return how many bits a value of an ONNX type takes."""
    narrow = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "BOOL": 8}
    name = onnx.TensorProto.DataType.Name(element_type)
    return narrow.get(name) or 8 * np.dtype(helper.tensor_dtype_to_np_dtype(element_type)).itemsize
