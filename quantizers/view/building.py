"""Builds the integer view of a student, and a table of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from quantizers import integer as ir
from quantizers.graph.trace import RewriteError
from quantizers.modes import evaluating
from quantizers.student import Student, act_quantizers, not_a_student, quant_layers
from quantizers.tensor_quant import NotCalibratedError
from quantizers.view.modules import Call, view_module

KEEPS_GRID = (ir.Shape, ir.MaxPool, ir.Concat)


def integer_view(student: Student) -> ir.IntegerView:
    """Return a calibrated student as integers; the student is not changed.

    Args:
        student: What :func:`quantizers.prepare` made, calibrated.

    Returns:
        Its nodes in order, with integer weights and biases, and the grid of each edge.

    Raises:
        NotCalibratedError: If an activation quantizer has no scale yet.
        RewriteError: If the student has a module or an output that :func:`quantizers.prepare` never writes (names it).
        TypeError: If it is not a student, or its parameters are not float32.
        ValueError: If a bias does not fit int32 or a scale is not finite (names the layer).
    """
    if not isinstance(getattr(student, "_orig_mod", student), fx.GraphModule):  # a compiled one has its attributes
        raise not_a_student(student, "integer_view")
    for name, quantizer in act_quantizers(student).items():
        if not quantizer.quant.is_calibrated:
            raise NotCalibratedError(name)
    _require_float32(student)
    with evaluating(student), torch.no_grad():
        return _Viewer(student).view()


def _require_float32(student: Student) -> None:
    for name, parameter in student.named_parameters():
        if parameter.dtype != torch.float32:
            raise TypeError(
                f"{name} is {parameter.dtype}: grids are float32, so the codes of such a student would differ from its "
                "file; call student.float() first"
            )


class _Viewer:
    def __init__(self, student: Student) -> None:
        self.student = student
        self.nodes: list[ir.Node] = []
        self.grids: dict[str, ir.Grid] = {}
        self.edges: dict[fx.Node, Any] = {}

    def view(self) -> ir.IntegerView:
        inputs: list[str] = []
        names: tuple[str, ...] = ()
        outputs: list[fx.Node] = []
        for node in self.student.graph.nodes:
            if node.op == "placeholder":
                self.edges[node] = node.name
                inputs.append(node.name)
            elif node.op == "output":
                names, outputs = _results(node.args[0])
            elif node.op == "call_module":
                self._module(node)
            else:
                raise RewriteError(
                    f"{node.name}: a student only calls modules, but this is {node.op} {node.target}; change the float "
                    "network and prepare it again instead of editing the student"
                )
        edges = tuple(self.edges[node] for node in outputs)
        return ir.IntegerView(tuple(self.nodes), self.grids, tuple(inputs), edges, names)

    def _module(self, node: fx.Node) -> None:
        # `args`, not `all_input_nodes`, which lists an operand that is used twice only once
        operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
        call = Call(
            name=str(node.target),
            inputs=tuple(self.edges[operand] for operand in operands),
            output=node.name,
            shapes=tuple(_shape(operand, node) for operand in operands),
            shape=_shape(node, node),
        )
        # not `named_modules`, which lists a module that is used in two places only once
        for made in view_module(call, self.student.get_submodule(call.name)):
            self.add(made)
        self.edges[node] = node.name

    def add(self, made: ir.Node) -> None:
        """Append a node; its output is on a grid if it is a quantizer or moves values that are on one."""
        self.nodes.append(made)
        grid = made.grid if isinstance(made, ir.Quantize) else None
        if isinstance(made, KEEPS_GRID):
            grid = self.grids.get(made.inputs[0])
        if grid is not None:
            self.grids[made.output] = grid


def _shape(node: fx.Node, reader: fx.Node) -> tuple[int, ...]:
    shape = node.meta.get("shape")
    if not isinstance(shape, tuple):
        raise RewriteError(f"{reader.target}: the shape of {node.name} is not known; prepare the float network again")
    return tuple(int(size) for size in shape)


def _results(result: Any) -> tuple[tuple[str, ...], list[fx.Node]]:
    """Return the names of the outputs (none unless the student returns a dictionary) and their nodes."""
    if isinstance(result, Mapping):
        names, values = tuple(map(str, result)), list(result.values())
    else:
        names, values = (), list(result) if isinstance(result, (tuple, list)) else [result]
    for position, value in enumerate(values):
        if not isinstance(value, fx.Node):
            place = repr(names[position]) if names else str(position)
            raise RewriteError(
                f"output {place} is {value!r}, not a tensor; return tensors, in at most one tuple, list or dictionary"
            )
    return names, values


def layer_report(student: Student) -> list[dict[str, Any]]:
    """Return the properties of each convolution and linear layer of a calibrated student.

    Args:
        student: What :func:`quantizers.prepare` made, calibrated.

    Returns:
        One row per layer: bits of weights and inputs, smallest and largest code in use and allowed, parameters, and
        multiply-accumulates per image.

    Raises:
        NotCalibratedError: If an activation quantizer has no scale yet.
        RewriteError: If the student has a module or an output that :func:`quantizers.prepare` never writes.
        TypeError: If it is not a student, or its parameters are not float32.
        ValueError: If a bias does not fit int32 or a scale is not finite (names the layer).
    """
    view = integer_view(student)
    shapes = {str(n.target): n.meta.get("shape") for n in student.graph.nodes}
    layers = quant_layers(student)
    rows = []
    for node in view.nodes:
        if not isinstance(node, (ir.Conv, ir.Linear)):
            continue
        grid, shape = view.grids[node.inputs[0]], shapes[node.name]
        layer = layers[node.name]
        rows.append(
            {
                "name": node.name,
                "kind": type(node).__name__.lower(),
                "weight_bits": node.weight_bits,
                "act_bits": grid.bits,
                "code_min": int(node.weights.min()),
                "code_max": int(node.weights.max()),
                "range_low": layer.quant.low_code,
                "range_high": layer.quant.high_code,
                "parameters": int(node.weights.size) + (0 if node.bias is None else int(node.bias.size)),
                "macs": ir.multiply_accumulates(shape[1:], node.weights.shape[1:]) if shape else 0,
            }
        )
    return rows
