"""Lower an integer view to an ONNX model, node by node.

The graph is built directly with ``onnx.helper``. The existing exporters were measured and rejected: PyTorch's keeps
batch norm, float weights and a quantizer for them at run time; so does Brevitas' QCDQ export, which refuses quantized
biases, too; its TorchScript path is deprecated. The integer view already holds every code, so nothing needs tracing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from export.checks import ExportError
from export.flavors import Flavor, without_custom_operators
from export.graph.builder import GraphBuilder
from export.lowering.functions import write_function
from export.lowering.moves import write_move
from export.lowering.pixels import write_normalization
from export.passes.saturation import WideGrid
from export.passes.windows import explicit_windows
from export.storage.blocked import DOMAIN as BLOCK_DOMAIN
from export.storage.blocked import write_blocked
from export.storage.needs import makers
from export.storage.packing import Storage, ir_version
from export.storage.preprocessing import Preprocessing, write_properties
from quantizers.integer import (
    Add,
    AveragePool,
    Concat,
    Conv,
    Function,
    GlobalAveragePool,
    Grid,
    IntegerView,
    Linear,
    MaxPool,
    Mul,
    Node,
    Quantize,
    Shape,
)

PRODUCER = "qkd-toolkit"
INPUT, OUTPUT = "images", "logits"


@dataclass(frozen=True)
class Lowered:
    """A model in memory.

    Args:
        model: The ONNX model.
        view: The arranged view it was written from.
        places: Name of the ONNX node -> the view's node it computes.
        steps: Name of the ONNX node -> how many ONNX nodes were written for that.
    """

    model: onnx.ModelProto
    view: IntegerView
    places: Mapping[str, Node]
    steps: Mapping[str, int]


def lower(
    view: IntegerView,
    flavor: Flavor,
    storage: Storage,
    input_shapes: Sequence[tuple[int, ...]],
    preprocessing: Preprocessing | None = None,
) -> Lowered:
    """Return the ONNX model of a checked view.

    Args:
        view: What the student computes; ``export.checks.check_view`` has passed it.
        flavor: How codes, weights and biases are stored.
        storage: Element types of weights, and the opset.
        input_shapes: A shape for each input, batch first; the batch becomes what the flavor wants, the rest is fixed.
        preprocessing: Of its images; recorded in the metadata, and part of the graph if it is inside.

    Raises:
        ExportError: If a node has no ONNX form, shapes do not fit each other, or preprocessing does not fit.
    """
    try:
        view = explicit_windows(view, input_shapes)
    except ValueError as error:
        raise ExportError(f"the graph does not fit together: {error}") from error
    _check_preprocessing(preprocessing, flavor, input_shapes)
    lowering = _Lowering(flavor.arrange(view), flavor, storage, preprocessing)
    for node in lowering.view.nodes:
        lowering.write(node)
    model = lowering.model(input_shapes)
    helper.set_model_props(model, _properties(view, lowering, storage))
    write_properties(model, {**(preprocessing.properties() if preprocessing else {}), **makers(model)})
    return Lowered(model, lowering.view, lowering.places, lowering.steps)


class _Lowering:
    """The state of one lowering: the graph so far, and the tensor of each edge (stored where it is on a grid)."""

    def __init__(
        self, view: IntegerView, flavor: Flavor, storage: Storage, preprocessing: Preprocessing | None
    ) -> None:
        self.view, self.flavor, self.storage = view, flavor, storage
        self.pixels = preprocessing if preprocessing is not None and preprocessing.is_inside else None
        self.inputs = [INPUT] if len(view.inputs) == 1 else list(view.inputs)
        self.outputs = output_names(view, self.inputs)
        self.graph = GraphBuilder(reserved=(*self.inputs, *self.outputs))
        self.tensors = dict(zip(view.inputs, self.inputs, strict=True))
        self.places: dict[str, Node] = {}
        self.steps: dict[str, int] = {}
        if self.pixels is not None:
            self.tensors[view.inputs[0]] = write_normalization(self.graph, INPUT, self.pixels)

    def write(self, node: Node) -> None:
        """Write one node and remember which ONNX node computes it."""
        writer = WRITERS.get(type(node))
        if writer is None:
            raise ExportError(f"{node.name}: no ONNX form is known for {type(node).__name__}")
        before = len(self.graph.nodes)
        self.tensors[node.output] = writer(self, node)
        if not isinstance(node, (Quantize, Shape)) and len(self.graph.nodes) > before:
            made = [entry.name for entry in self.graph.nodes[before:]]
            place = node.name if node.name in made else made[-1]
            self.places[place] = node
            # a function's input may have been dequantized for it, which is not one of its steps
            self.steps[place] = sum(entry.op_type != "DequantizeLinear" for entry in self.graph.nodes[before:])

    def grid(self, edge: str) -> Grid | None:
        """Return the grid of an edge, or None if it is real-valued."""
        return self.view.grids.get(edge)

    def real(self, edge: str) -> str:
        """Return a real tensor of the edge, for one reader."""
        grid = self.grid(edge)
        stored = self.tensors[edge]
        return stored if grid is None else self.flavor.dequantize(self.graph, edge, stored, grid)

    def add(self, node: Node, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append an ONNX node that carries the names of the view's node and edge."""
        return self.graph.add(operator, inputs, node.output, name=node.name, **attributes)

    def model(self, input_shapes: Sequence[tuple[int, ...]]) -> onnx.ModelProto:
        """Return the checked model, its outputs named and shaped."""
        self._name_outputs()
        batch = "batch" if self.flavor.has_dynamic_batch else 1
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, *shape[1:]])
            for name, shape in zip(self.inputs, input_shapes, strict=True)
        ]
        if self.pixels is not None:
            inputs = [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, self.pixels.input_shape(batch))]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self.outputs]
        proto = helper.make_graph(self.graph.nodes, "student", inputs, outputs, self.graph.initializers)
        opset = self.storage.opset
        model = helper.make_model(
            proto,
            opset_imports=[helper.make_opsetid(*entry) for entry in self._domains().items()],
            ir_version=ir_version(opset),
            producer_name=PRODUCER,
            producer_version=toolkit_version(),
        )
        return _shaped(model, is_opaque=bool(self.flavor.domains))

    def _domains(self) -> dict[str, int]:
        blocks = {BLOCK_DOMAIN: 1} if self.storage.blocks else {}
        return {"": self.storage.opset, **self.flavor.domains, **blocks}

    def _name_outputs(self) -> None:
        for edge, name in zip(self.view.outputs, self.outputs, strict=True):
            tensor = self.real(edge)
            if tensor in self.inputs or tensor in self.outputs:
                self.graph.nodes.append(helper.make_node("Identity", [tensor], [name], name=name))
            else:
                self.graph.rename_output(tensor, name)
                self.tensors = {key: name if value == tensor else value for key, value in self.tensors.items()}


def output_names(view: IntegerView, inputs: Sequence[str]) -> list[str]:
    """Return the names of a file's outputs: the keys of a dictionary that the student returns, else ``logits``, ..."""
    names = list(view.output_names)
    if not names:
        return [OUTPUT, *(f"{OUTPUT}_{number}" for number in range(2, len(view.outputs) + 1))]
    if "" in names or set(names) & set(inputs):
        raise ExportError(
            f"the outputs {names} cannot be named so in the file: a name is empty or that of the input; return other "
            "keys"
        )
    return names


def _shaped(model: onnx.ModelProto, *, is_opaque: bool) -> onnx.ModelProto:
    """Return the model with the shapes of its outputs filled in, after onnx.checker has passed it.

    If a flavor's operators are not ONNX's own (``is_opaque``), its readers cannot infer shapes by themselves: all
    tensors get theirs.
    """
    plain = without_custom_operators(model) if len(model.opset_import) > 1 else model
    try:
        inferred = onnx.shape_inference.infer_shapes(plain, check_type=True, strict_mode=True, data_prop=True)
        for known in (model, plain):
            del known.graph.output[:]
            known.graph.output.extend(inferred.graph.output)
        onnx.checker.check_model(plain, full_check=True)
        if is_opaque:
            model.graph.value_info.extend(inferred.graph.value_info)
            onnx.checker.check_model(model)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise ExportError(f"the graph does not fit together: {error}") from error
    return model


def toolkit_version() -> str:
    """Return the version of the installed distribution, or ``unknown`` when run from a bare checkout."""
    try:
        return metadata.version(PRODUCER)
    except metadata.PackageNotFoundError:
        return "unknown"


def _check_preprocessing(
    preprocessing: Preprocessing | None, flavor: Flavor, input_shapes: Sequence[tuple[int, ...]]
) -> None:
    if preprocessing is None:
        return
    if len(input_shapes) != 1:
        raise ExportError(f"preprocessing describes one input, but the model has {len(input_shapes)}")
    preprocessing.check_fits(input_shapes[0])
    if preprocessing.is_inside and not flavor.takes_pixels:
        raise ExportError(
            f"flavor {flavor.name!r} cannot hold the normalization of its images: its readers want floats on a Quant "
            "node; leave preprocessing outside, or use flavor 'ort' or 'qcdq'"
        )


def _write_quantize(lowering: _Lowering, node: Quantize) -> str:
    edge = node.inputs[0]
    stored, old = lowering.tensors[edge], lowering.grid(edge)
    if old is None:
        return lowering.flavor.quantize(lowering.graph, node, stored)
    return lowering.flavor.requantize(lowering.graph, node, stored, old)


def _layer_inputs(lowering: _Lowering, node: Conv | Linear) -> list[str]:
    edge = node.inputs[0]
    grid = lowering.grid(edge)
    if grid is None:
        raise ExportError(f"{node.name}: its input {edge!r} is not quantized")
    tensors = [lowering.real(edge), lowering.flavor.weights(lowering.graph, node, lowering.storage)]
    return tensors if node.bias is None else [*tensors, lowering.flavor.bias(lowering.graph, node, grid)]


def _write_conv(lowering: _Lowering, node: Conv) -> str:
    return lowering.add(
        node,
        "Conv",
        _layer_inputs(lowering, node),
        kernel_shape=list(node.weights.shape[2:]),
        strides=list(node.stride),
        pads=list(node.padding),
        dilations=list(node.dilation),
        group=node.groups,
    )


def _write_linear(lowering: _Lowering, node: Linear) -> str:
    grid, blocks = lowering.grid(node.inputs[0]), lowering.storage.blocks.get(node.name)
    if grid is not None and blocks is not None:
        stored = lowering.tensors[node.inputs[0]]
        return write_blocked(lowering.graph, node, stored, grid.zero_point, grid.scale, blocks)
    # Gemm and not MatMul + Add: ONNX Runtime has one integer kernel, bias included, for the former
    return lowering.add(node, "Gemm", _layer_inputs(lowering, node), transB=1)


def _write_pair(lowering: _Lowering, node: Node) -> str:
    return lowering.add(node, type(node).__name__, [lowering.real(edge) for edge in node.inputs])


def _write_concat(lowering: _Lowering, node: Concat) -> str:
    return lowering.add(node, "Concat", [lowering.tensors[edge] for edge in node.inputs], axis=node.axis)


def _write_max_pool(lowering: _Lowering, node: MaxPool) -> str:
    return lowering.add(
        node,
        "MaxPool",
        [lowering.tensors[node.inputs[0]]],
        kernel_shape=list(node.kernel),
        strides=list(node.stride),
        pads=list(node.padding),
        dilations=list(node.dilation),
        ceil_mode=int(node.ceil_mode),
    )


def _write_average_pool(lowering: _Lowering, node: AveragePool) -> str:
    return lowering.add(
        node,
        "AveragePool",
        [lowering.real(node.inputs[0])],
        kernel_shape=list(node.kernel),
        strides=list(node.stride),
        pads=list(node.padding),
        ceil_mode=int(node.ceil_mode),
        count_include_pad=int(node.count_include_pad),
    )


def _write_global_average_pool(lowering: _Lowering, node: GlobalAveragePool) -> str:
    if not node.keepdims:
        raise ExportError(f"{node.name}: a global mean must keep its axes here (rewrite.spell_out)")
    return lowering.add(node, "GlobalAveragePool", [lowering.real(node.inputs[0])])


def _write_function(lowering: _Lowering, node: Function) -> str:
    return write_function(lowering.graph, node, lowering.real(node.inputs[0]))


def _write_shape(lowering: _Lowering, node: Shape) -> str:
    edge = node.inputs[0]
    grid = lowering.grid(edge)

    def zero() -> str:
        if grid is None:
            return lowering.graph.constant(f"{node.name}.zero", np.float32(0))
        return lowering.flavor.padding_value(lowering.graph, node.name, grid)

    return write_move(lowering.graph, node, lowering.tensors[edge], zero)


WRITERS: dict[type[Node], Callable[[_Lowering, Any], str]] = {
    Add: _write_pair,
    AveragePool: _write_average_pool,
    Concat: _write_concat,
    Conv: _write_conv,
    Function: _write_function,
    GlobalAveragePool: _write_global_average_pool,
    Linear: _write_linear,
    MaxPool: _write_max_pool,
    Mul: _write_pair,
    Quantize: _write_quantize,
    Shape: _write_shape,
}


def _properties(view: IntegerView, lowering: _Lowering, storage: Storage) -> dict[str, str]:
    """Return the file's metadata: makers, bits, and where each quantizer's codes are found."""
    layers = [node for node in view.nodes if isinstance(node, (Conv, Linear))]
    properties = {
        "toolkit": f"{PRODUCER} {toolkit_version()}",
        "flavor": lowering.flavor.name,
        "opset": str(storage.opset),
        "weight_bits": json.dumps({node.name: node.weight_bits for node in layers}),
        "input_bits": json.dumps({node.name: view.grids[node.inputs[0]].bits for node in layers}),
        "quantizers": json.dumps(_taps(view, lowering)),
        "blocks": json.dumps({name: [blocks.bits, blocks.size] for name, blocks in storage.blocks.items()}),
        "unused_codes": json.dumps(_unused_codes(lowering)),
    }
    step = output_step(view)
    return properties if step is None else {**properties, "output_step": repr(step)}


def _taps(view: IntegerView, lowering: _Lowering) -> list[dict[str, object]]:
    return [
        {
            "name": node.name,
            "tensor": lowering.tensors[node.output],
            "scale": float(np.float32(node.grid.scale)),
            "zero_point": lowering.flavor.zero_point(lowering.view.grids[node.output]),
            "bits": node.grid.bits,
            "type": TensorProto.DataType.Name(lowering.flavor.stored_type),
        }
        for node in view.nodes
        if isinstance(node, Quantize)
    ]


def _unused_codes(lowering: _Lowering) -> dict[str, int]:
    """Return the width of the codes in each tensor that could store more of them than occur."""
    grids = lowering.view.grids
    return {lowering.tensors[edge]: grid.bits for edge, grid in grids.items() if isinstance(grid, WideGrid)}


def last_edge(view: IntegerView) -> tuple[str, Node | None]:
    """Return the edge that the first output is, ignoring moves of real values, and the node that makes it, if any."""
    edge = view.outputs[0]
    makers = {node.output: node for node in view.nodes}
    while edge not in view.grids and isinstance(makers.get(edge), Shape):
        edge = makers[edge].inputs[0]
    return edge, makers.get(edge)


def output_step(view: IntegerView) -> float | None:
    """Return the real size of one step of the first output: of its grid, or of the accumulator it is read from.

    For a layer it is its coarsest channel's ``input scale * weight scale``; for a sum or a mean, the largest scale of
    its inputs. None if a float function comes last.
    """
    edge, node = last_edge(view)
    if edge in view.grids:
        return float(view.grids[edge].scale)
    if isinstance(node, (Conv, Linear)):
        return float(view.grids[node.inputs[0]].scale * node.weight_scale.max())
    if isinstance(node, (Add, AveragePool, GlobalAveragePool)):
        return max((float(view.grids[name].scale) for name in node.inputs if name in view.grids), default=None)
    return None
