"""Read a file's metadata, and raise clear errors if a file from elsewhere is malformed.

`export_onnx` writes widths, codes and blocks into ``metadata_props`` as JSON; anybody can write anything there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import onnx

from export.checks import ExportError
from export.moved import with_new_key, with_new_keys

MOST_CHARACTERS = 16_000_000  # of one entry; a net of a thousand layers has a hundred thousand
MOST_BITS = 64
MOST_RANK = 32  # axes of a tensor; numpy allows 64
LARGEST_AXIS = 2**31


def properties_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the entries of a file's metadata, those of earlier versions under the current keys.

    Raises:
        ValueError: If a key occurs twice, so that two readers could take two values for it.
    """
    require_unique("the metadata key", [with_new_key(entry.key) for entry in model.metadata_props])
    return with_new_keys({entry.key: entry.value for entry in model.metadata_props})


def require_unique(what: str, names: Iterable[str]) -> None:
    """Raise if a name occurs twice.

    Args:
        what: What the names are of, for the message.
        names: The names.

    Raises:
        ValueError: If so (gives the name).
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{what} {name!r} occurs twice in the file, so it is not clear which one counts")
        seen.add(name)


def strip_notes(model: onnx.ModelProto) -> None:
    """Delete an exporter's notes from a model: lines and paths of sources, names of modules.

    PyTorch's exporter puts the stack of every node there: private paths, and a different file for each export.

    Args:
        model: Changed in place: documentation and metadata of itself, of its graphs, functions, nodes and values.
    """
    model.doc_string = ""
    del model.metadata_props[:]
    graphs: list[Any] = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        values = [*graph.value_info]
        if isinstance(graph, onnx.GraphProto):
            values += [*graph.input, *graph.output, *graph.initializer]
        for part in (graph, *values, *graph.node):
            part.doc_string = ""
            del part.metadata_props[:]
        for entry in (entry for node in graph.node for entry in node.attribute):
            entry.doc_string = ""
            graphs += [*entry.graphs, *([entry.g] if entry.HasField("g") else [])]


def read_property(model: onnx.ModelProto, key: str, default: Any) -> Any:
    """Return the JSON value of an entry of a file's metadata, of the type of ``default``.

    Raises:
        ValueError: If the entry is not JSON, or of another type.
    """
    text = properties_of(model).get(key)
    if text is None:
        return default
    try:
        value = json.loads(text) if len(text) <= MOST_CHARACTERS else None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata `{key}` is not JSON ({error}); export it again") from error
    if not isinstance(value, type(default)):
        found = type(value).__name__
        raise ValueError(f"its metadata `{key}` must be a {type(default).__name__}, found {found}; export it again")
    return value


def read_widths(model: onnx.ModelProto, key: str) -> dict[str, int]:
    """Return an entry that maps names to bit widths.

    Raises:
        ValueError: If it holds anything else.
    """
    value = read_property(model, key, {})
    for name, bits in value.items():
        if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MOST_BITS:
            raise ValueError(
                f"its metadata `{key}` gives {name!r} a width of {bits!r}; it must be 1 to {MOST_BITS} bits: export it "
                f"again"
            )
    return dict(value)


def check_structure(model: onnx.ModelProto) -> None:
    """Raise unless every tensor is made once, before it is read, and has a shape a tensor can have.

    Raises:
        ValueError: If not (names the place): a cycle, a missing or repeated tensor, a negative or endless axis.
    """
    graph = model.graph
    require_unique("the constant", (entry.name for entry in graph.initializer))
    for what in ("input", "output"):
        require_unique(f"the {what}", (entry.name for entry in getattr(graph, what)))
    made = {entry.name for entry in (*graph.input, *graph.initializer)}
    for node in graph.node:
        missing = [name for name in node.input if name and name not in made]
        if missing:
            raise ValueError(
                f"the node {node.name or node.op_type!r} reads {missing[0]!r}, which no earlier node makes: the nodes"
                f" are in a cycle, or out of order"
            )
        if not node.output or len(set(node.output)) != len(node.output) or made & (set(node.output) - {""}):
            raise ValueError(f"the node {node.name or node.op_type!r} makes nothing, or the same tensor as another one")
        made.update(node.output)
    for tensor in graph.initializer:
        _check_shape(tensor.name, list(tensor.dims))
    for entry in (*graph.input, *graph.output, *graph.value_info):
        _check_shape(entry.name, [dim.dim_value for dim in entry.type.tensor_type.shape.dim])


def _check_shape(name: str, sizes: list[int]) -> None:
    if len(sizes) > MOST_RANK or any(not 0 <= size <= LARGEST_AXIS for size in sizes):
        raise ValueError(f"the tensor {name!r} has the shape {sizes[:8]}, which no tensor can have")


@contextmanager
def as_a_file(path: str | PathLike[str], purpose: str) -> Iterator[None]:
    """Raise an error that names the file if its graph is malformed (attributes, inputs or types missing).

    Args:
        path: The file.
        purpose: What it cannot be used for.

    Raises:
        ValueError: In place of whatever reading the graph raised; errors that explain themselves keep their message.
    """
    where = str(path)
    try:
        yield
    except ExportError:
        raise
    except (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration, RecursionError) as error:
        raise ValueError(
            f"{where}: its graph cannot be read {purpose}: something in it is missing or of another kind "
            f"({type(error).__name__}: {str(error)[:200]}); export it again"
        ) from error
    except (ValueError, RuntimeError, MemoryError) as error:
        words = str(error) or type(error).__name__
        raise ValueError(words if words.startswith(where) else f"{where}: {words}") from error
