"""Compare a file's graph with the one that export writes for its student: nodes, attributes, constants, all exact."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from export.checks import check_view
from export.conversion.repack import repack
from export.flavors import Flavor, find_flavor
from export.lowering.model import PRODUCER, lower, toolkit_version
from export.storage.blocked import WIDTHS
from export.storage.metadata import properties_of, read_property
from export.storage.packing import INT2, INT4, INT8, Blocks
from export.storage.preprocessing import Preprocessing
from export.targets.form import target_of, write_for
from quantizers.integer import IntegerView, Linear

# Entries of a file's metadata that are not compared here: what wrote it, and its quantizers, which `ways.py` compares.
FREE_ENTRIES = ("toolkit", "quantizers", "versions")
STRAY_FIELDS = ("sparse_initializer", "quantization_annotation")
WAY_OUT = "export it again, or judge a file that another program rewrote by its behavior alone (constants=False)"


@dataclass(frozen=True)
class GraphParity:
    """Result of comparing two graphs.

    Args:
        compared: Constants, attributes and entries of metadata compared, each as a whole; 0 if the graphs could not
            be compared.
        differences: Each part of the file that differs from what export writes for the student.
        note: Why the graphs were not compared; empty if they were.
    """

    compared: int = 0
    differences: tuple[str, ...] = ()
    note: str = ""


def compare_graphs(
    model: ModelProto, view: IntegerView, image_shape: Sequence[int], preprocessing: Preprocessing | None = None
) -> GraphParity:
    """Compare a file with what export writes for the view in the same flavor, storage and operator set.

    The comparison is exact: one bit of one constant is a difference. Names of nodes, their order and comments are not
    part of a function and are ignored. A file that names another program, or another version of this toolkit, as its
    writer may hold another graph; then it is not compared, and the note says so. If the graph is the same, its
    constants are compared.

    Args:
        model: The file.
        view: What the student computes.
        image_shape: Shape of one image: ``[channels, height, width]``.
        preprocessing: How images are preprocessed, which the file must confirm; None skips this comparison.
    """
    try:
        wanted = _written_again(model, view, image_shape, preprocessing)
    except ValueError as error:
        return _refused(model, f"export cannot write such a file of this student: {error}")
    structure = list(_structure(model, wanted))
    if structure and (writer := _other_writer(model)):
        return GraphParity(
            note=f"constants were not compared with the student's, only behavior on these images: {writer} wrote the "
            f"file, and its graph is not the one that export writes ({structure[0]})"
        )
    if structure:
        structure[-1] += f" ({WAY_OUT})"
    counted = list(_values(model, wanted))
    return GraphParity(len(counted), (*structure, *(words for words in counted if words)))


def _refused(model: ModelProto, why: str) -> GraphParity:
    if writer := _other_writer(model):
        return GraphParity(note=f"constants were not compared with the student's: {writer} wrote the file, and {why}")
    return GraphParity(differences=(f"{why} ({WAY_OUT})",))


def _other_writer(model: ModelProto) -> str:
    """Return who wrote a file, in words; empty if it was this version of the toolkit."""
    toolkit = properties_of(model).get("toolkit", "")
    if model.producer_name == PRODUCER and toolkit == f"{PRODUCER} {toolkit_version()}":
        return ""
    if model.producer_name == PRODUCER:
        return f"{toolkit or PRODUCER}, and not {PRODUCER} {toolkit_version()},"
    return f"the program {model.producer_name!r}" if model.producer_name else "a program that does not give its name"


def _written_again(
    model: ModelProto, view: IntegerView, image_shape: Sequence[int], preprocessing: Preprocessing | None
) -> ModelProto:
    """Return the view as a model in the form of the file: every choice made at export is read from the file.

    Raises:
        ValueError: If export cannot produce such a form.
    """
    check_view(view)
    flavor = find_flavor(properties_of(model).get("flavor", ""))
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    chosen = flavor.storage(view, "int8", opset)
    blocks, unblocked = _blocks(model, view)
    storage = replace(chosen, blocks={**blocks, **unblocked})
    if flavor.name == "ort":
        storage = replace(storage, types=_types(model))
    written = lower(view, flavor, storage, [(_batch(flavor), *image_shape)], preprocessing).model
    if unblocked:
        names = [*(kind.name for kind in storage.types), *(cut.name for cut in blocks.values())]
        written = onnx.load_from_string(repack(bytes(written.SerializeToString()), names))
    write_for(written, target_of(model))
    return written


def _batch(flavor: Flavor) -> int:
    return 2 if flavor.has_dynamic_batch else 1


def _types(model: ModelProto) -> tuple[Any, ...]:
    """Return the element types that a file stores weights in; every width gets the narrowest that holds it."""
    used = {tensor.data_type for tensor in model.graph.initializer}
    return tuple(kind for kind in (INT2, INT4) if kind.code in used) + (INT8,)


def _blocks(model: ModelProto, view: IntegerView) -> tuple[dict[str, Blocks], dict[str, Blocks]]:
    """Return the linear layers that a file stores in blocks, and those that ``repack`` took out of blocks.

    How they are cut follows from their width; a layer that was taken out reads an input that is not shared.
    """
    cut = set(read_property(model, "blocks", {}))
    made = {name for node in model.graph.node for name in node.output}
    layers = {
        node.name: next(blocks for blocks in WIDTHS if blocks.bits >= node.weight_bits)
        for node in view.nodes
        if isinstance(node, Linear) and node.weight_bits <= WIDTHS[-1].bits
    }
    blocks = {name: layers[name] for name in layers if name in cut}
    return blocks, {name: layers[name] for name in layers if name not in cut and f"{name}.input.real" in made}


def _structure(found: ModelProto, wanted: ModelProto) -> Iterator[str]:
    """Yield each structural difference of two graphs: versions, inputs and outputs, nodes and what they read."""
    yield from _headers(found, wanted)
    yield from _nodes(found.graph, wanted.graph)
    names = [{tensor.name for tensor in model.graph.initializer} for model in (found, wanted)]
    yield from (
        f"the constant {name!r} is in the file, but not in what export writes" for name in sorted(names[0] - names[1])
    )
    yield from (f"the constant {name!r} is missing from the file" for name in sorted(names[1] - names[0]))


def _headers(found: ModelProto, wanted: ModelProto) -> Iterator[str]:
    opsets = [{entry.domain: entry.version for entry in model.opset_import} for model in (found, wanted)]
    if opsets[0] != opsets[1]:
        yield f"its operator sets are {opsets[0]}, but export writes {opsets[1]}"
    if found.ir_version != wanted.ir_version:
        yield f"its IR version is {found.ir_version}, but export writes {wanted.ir_version}"
    if found.functions:
        yield f"it defines {len(found.functions)} local functions ({found.functions[0].name!r})"
    for field in STRAY_FIELDS:
        if getattr(found.graph, field):
            yield f"its graph has {field}, which export never writes"
    for what in ("input", "output"):
        ends = [[_end(entry) for entry in getattr(model.graph, what)] for model in (found, wanted)]
        if ends[0] != ends[1]:
            yield f"its {what}s are {ends[0]}, but export writes {ends[1]}"


def _end(entry: ValueInfoProto) -> str:
    kind = entry.type.tensor_type
    # shape inference numbers unknown axes (unk__2) in the order in which it meets them
    names = ["?" if size.dim_param.startswith("unk__") else size.dim_param for size in kind.shape.dim]
    sizes = [name or str(size.dim_value) for name, size in zip(names, kind.shape.dim, strict=True)]
    return f"{entry.name}: {TensorProto.DataType.Name(kind.elem_type)} [{', '.join(sizes)}]"


def _nodes(found: GraphProto, wanted: GraphProto) -> Iterator[str]:
    theirs, ours = _by_output(found), _by_output(wanted)
    if len(theirs) != len(found.node):
        yield "two of its nodes make the same tensor, or one makes none"
    for output, node in theirs.items():
        other = ours.get(output)
        if other is None:
            yield f"the node {node.op_type} that makes {output!r} is in the file, but not in what export writes"
        elif _read(node) != _read(other):
            yield f"{output!r} is {_shown(node)} in the file, but export writes {_shown(other)}"
    for output, node in ours.items():
        if output not in theirs:
            yield f"the node {node.op_type} that makes {output!r} is missing from the file"


def _by_output(graph: GraphProto) -> dict[str, NodeProto]:
    return {", ".join(node.output): node for node in graph.node}


def _read(node: NodeProto) -> tuple[str, str, list[str]]:
    return node.domain, node.op_type, list(node.input)


def _shown(node: NodeProto) -> str:
    return f"{node.op_type} of {', '.join(node.input)}"


def _values(found: ModelProto, wanted: ModelProto) -> Iterator[str]:
    """Yield, for each constant and attribute of both graphs and entry of metadata, how it differs, or ""."""
    tensors = {tensor.name: tensor for tensor in found.graph.initializer}
    for tensor in wanted.graph.initializer:
        if tensor.name in tensors:
            yield _different_tensor(f"the constant {tensor.name!r}", tensors[tensor.name], tensor)
    nodes = _by_output(found.graph)
    for output, node in _by_output(wanted.graph).items():
        if output in nodes and nodes[output].op_type == node.op_type:
            yield from _attributes(output, nodes[output], node)
    entries = properties_of(found)
    for key, value in properties_of(wanted).items():
        if key not in FREE_ENTRIES:
            yield _different_entry(key, entries.get(key), value)


def _different_entry(key: str, found: str | None, wanted: str) -> str:
    if found == wanted:
        return ""
    return f"its metadata `{key}` is {str(found)[:80]}, but export writes {wanted[:80]}"


def _attributes(output: str, found: NodeProto, wanted: NodeProto) -> Iterator[str]:
    theirs, ours = ({entry.name: entry for entry in node.attribute} for node in (found, wanted))
    for name in dict.fromkeys((*ours, *theirs)):
        what = f"the attribute {name} of {wanted.op_type} {wanted.name!r} (which makes {output!r})"
        yield _different_attribute(what, theirs.get(name), ours.get(name))


def _different_attribute(what: str, found: AttributeProto | None, wanted: AttributeProto | None) -> str:
    if found is not None and wanted is not None and found.type == wanted.type == AttributeProto.TENSOR:
        return _different_tensor(what, found.t, wanted.t)
    theirs, ours = (_attribute(entry) for entry in (found, wanted))
    return "" if theirs == ours else f"{what} is {theirs[:80]} in the file, {ours[:80]} in the student"


def _attribute(entry: AttributeProto | None) -> str:
    if entry is None:
        return "not given"
    return f"{helper.get_attribute_value(entry)}" + (f" by {entry.ref_attr_name!r}" if entry.ref_attr_name else "")


def _different_tensor(what: str, found: TensorProto, wanted: TensorProto) -> str:
    kinds = [f"{TensorProto.DataType.Name(tensor.data_type)} {list(tensor.dims)}" for tensor in (found, wanted)]
    if kinds[0] != kinds[1]:
        return f"{what} is {kinds[0]} in the file, {kinds[1]} in the student"
    try:
        theirs, ours = (np.ascontiguousarray(numpy_helper.to_array(tensor)) for tensor in (found, wanted))
    except (ValueError, TypeError) as error:  # for example, fewer bytes than its shape needs
        return f"{what} cannot be read: {error}"
    if theirs.tobytes() == ours.tobytes():
        return ""
    return f"{what} {_first(theirs.reshape(-1), ours.reshape(-1), list(wanted.dims))}"


def _first(found: np.ndarray, wanted: np.ndarray, sizes: list[int]) -> str:
    """Return the first value that differs, by its bits, and how many do."""
    width = found.dtype.itemsize
    bits = [values.view(np.uint8).reshape(-1, width) for values in (found, wanted)]
    places = np.flatnonzero((bits[0] != bits[1]).any(1))
    first = int(places[0])
    where = f" at {[int(index) for index in np.unravel_index(first, sizes)]}" if sizes else ""
    more = f" ({len(places):,} of {len(found):,} values differ)" if len(found) > 1 else ""
    return f"is {_number(found[first])} in the file, {_number(wanted[first])} in the student{where}{more}"


def _number(value: Any) -> str:
    number = float(value)
    is_whole = number.is_integer() and not (number == 0 and np.signbit(number))
    return f"{int(number)}" if is_whole and abs(number) < 2**32 else f"{number:.9g}"  # nine digits identify a float32
