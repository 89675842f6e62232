"""Compare integer codes layer by layer: file against student, and integer kernels against the file's own arithmetic.

A difference of one step in an early layer changes what every later layer sees, so a whole network says little about a
kernel. ``SingleLayers`` therefore cuts the graph at every quantizer and feeds each piece the codes it should get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from export.codes import Codes, Found, as_codes
from export.runtime import open_session

Arrays = Mapping[str, npt.NDArray[Any]]
Result = TypeVar("Result")


@dataclass(frozen=True)
class LayerParity:
    """The integer codes of one quantizer.

    Args:
        name: The quantizer's module path.
        values: Codes compared.
        differing: Codes of the student that differ from the file's, optimizations off.
        max_steps: Largest such difference.
        differing_on: Codes of the integer kernels up to here that differ from the file's with optimizations off,
            both fed the same codes.
        max_steps_on: Largest such difference.
    """

    name: str
    values: int
    differing: int
    max_steps: int
    differing_on: int
    max_steps_on: int


class LayerTally:
    """Sums over images of the differences in each quantizer's codes.

    Args:
        taps: What is compared, in order of computation; each has a ``name``.
    """

    def __init__(self, taps: Sequence[Mapping[str, Any]]) -> None:
        self.names = [str(tap["name"]) for tap in taps]
        self.images = 0
        self.values = [0] * len(taps)
        self.has_codes = [False] * len(taps)
        self.student, self.kernels = _Differences(len(taps)), _Differences(len(taps))
        self.missing: dict[str, str] = {}
        self.output_difference = 0.0
        self.output_beyond = 0  # batches in which it was more than allowed

    def saw_output(self, off: npt.NDArray[Any], on: npt.NDArray[Any] | str, allowed: float) -> None:
        """Add the outputs of the last layer alone, both fed the same codes; or why its kernel gave none.

        Args:
            off: Outputs of the file with optimizations off.
            on: Outputs of the kernel.
            allowed: How far apart they may be.
        """
        if isinstance(on, str) or off.shape != on.shape:
            self.missing["the last layer"] = on if isinstance(on, str) else _shapes("file", off, "kernel", on)
            return
        difference = distance(off, on)
        largest = float(difference.max(initial=0))
        self.output_difference = max(self.output_difference, largest)
        self.output_beyond += int(largest > allowed)

    def add(self, student: Sequence[Found], off: Sequence[Found], on: Sequence[Found], images: int) -> None:
        """Add a batch: codes of the student, the file and its kernels one by one; or why there are none."""
        self.images += images
        for index, (ours, theirs, kernels) in enumerate(zip(student, off, on, strict=True)):
            why = _incomparable(ours, theirs, kernels)
            if why:
                self.missing.setdefault(self.names[index], why)
            else:
                self._add(index, cast(Codes, ours), cast(Codes, theirs), cast(Codes, kernels))

    def _add(self, index: int, ours: Codes, theirs: Codes, kernels: Codes) -> None:
        self.values[index] += theirs.size
        self.has_codes[index] |= bool(ours.any())
        self.student.add(index, ours, theirs)
        self.kernels.add(index, kernels, theirs)

    def rows(self) -> tuple[LayerParity, ...]:
        """Return one row per quantizer that was compared."""
        rows = zip(self.names, self.values, *self.student.columns, *self.kernels.columns, strict=True)
        return tuple(LayerParity(*row) for row in rows if row[1])

    def uncompared(self) -> dict[str, str]:
        """Return each quantizer whose codes were not all compared, and why."""
        empty = {name: "it gives no values" for name, values in zip(self.names, self.values, strict=True) if not values}
        return {**empty, **self.missing}

    def silent(self) -> list[str]:
        """Return the quantizers that gave only zeros: they are equal, but that shows nothing."""
        pairs = zip(self.names, self.values, self.has_codes, strict=True)
        return [name for name, values, has_codes in pairs if values and not has_codes]


def _incomparable(ours: Found, theirs: Found, kernels: Found) -> str:
    for found in (ours, theirs, kernels):
        if isinstance(found, str):
            return found
    student, file, alone = (cast(Codes, found) for found in (ours, theirs, kernels))
    if student.shape != file.shape:
        return _shapes("student", student, "file", file)
    return "" if alone.shape == file.shape else _shapes("file", file, "kernel", alone)


def _shapes(one: str, ours: npt.NDArray[Any], other: str, theirs: npt.NDArray[Any]) -> str:
    return f"shape {list(ours.shape)} in the {one}, {list(theirs.shape)} in the {other}"


class _Differences:
    def __init__(self, count: int) -> None:
        self.columns = ([0] * count, [0] * count)  # codes that differ, largest difference

    def add(self, index: int, ours: Codes, theirs: Codes) -> None:
        steps = np.abs(ours - theirs)
        differing, largest = self.columns
        differing[index] += int(np.count_nonzero(steps))
        largest[index] = max(largest[index], int(steps.max(initial=0)))


def distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return how far apart values are; infinity if either is not finite, since NaN would be within every bound."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(one.astype(np.float64) - other)
    apart[~np.isfinite(apart)] = np.inf
    return np.asarray(apart, np.float64)


class SingleLayers:
    """Every piece of a graph between quantizers, opened separately with optimizations on.

    Args:
        model: The whole graph.
        tensors: Stored tensors of its quantizers; the graph is cut at these.
        inputs: Names of the graph's inputs.
        output: Name of its (first) output.
        threads: ONNX Runtime's threads.
    """

    def __init__(
        self, model: onnx.ModelProto, tensors: Sequence[str], inputs: Sequence[str], output: str, threads: int
    ) -> None:
        self.model, self.tensors, self.output, self.threads = model, tensors, output, threads
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.initializers = {entry.name: entry for entry in model.graph.initializer}
        self.cuts = {*tensors, *inputs}
        self.sessions: dict[str, tuple[Any, list[str]]] = {}

    def run(self, found: Arrays) -> dict[str, npt.NDArray[Any] | str]:
        """Return each quantizer's tensor and the output as computed by the integer kernels before it.

        Args:
            found: The codes at every cut and the model's inputs, which each piece is fed.

        Returns:
            Tensor -> its values, or why ONNX Runtime cannot run its piece.
        """
        return {target: attempted(self._run, target, found) for target in (*self.tensors, self.output)}

    def _run(self, target: str, found: Arrays) -> npt.NDArray[Any]:
        if target not in self.sessions:
            self.sessions[target] = self._open(target, found)
        session, feeds = self.sessions[target]
        return np.asarray(session.run([target], {name: found[name] for name in feeds})[0])

    def _open(self, target: str, found: Arrays) -> tuple[Any, list[str]]:
        nodes, feeds = self._piece(target)
        used = {name for node in nodes for name in node.input}
        inputs = [helper.make_tensor_value_info(name, *_type_of(found[name])) for name in feeds]
        output = helper.make_tensor_value_info(target, _type_of(found[target])[0], None)
        constants = [entry for name, entry in self.initializers.items() if name in used]
        piece = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        piece.graph.CopyFrom(helper.make_graph(nodes, "piece", inputs, [output], constants))
        return open_session(piece.SerializeToString(), optimize=True, threads=self.threads), feeds

    def _piece(self, target: str) -> tuple[list[onnx.NodeProto], list[str]]:
        """Return the nodes between the cuts before ``target`` and itself, in the graph's order, and those cuts."""
        made: set[str] = set()
        feeds: dict[str, None] = {}
        pending = [target]
        while pending:
            tensor = pending.pop()
            if tensor in self.cuts and tensor != target:
                feeds[tensor] = None
            elif tensor in self.makers and self.makers[tensor].output[0] not in made:
                made.add(self.makers[tensor].output[0])  # nodes may have no names, outputs always have
                pending += [name for name in self.makers[tensor].input if name]
        return [node for node in self.model.graph.node if node.output[0] in made], list(feeds)


def _type_of(array: npt.NDArray[Any]) -> tuple[int, list[str | int]]:
    return helper.np_dtype_to_tensor_dtype(array.dtype), ["batch", *array.shape[1:]]


def attempted(function: Callable[..., Result], *given: Any, who: str = "ONNX Runtime") -> Result | str:
    """Return the result of a call into a runtime, or its message if it fails."""
    try:
        return function(*given)
    except (MemoryError, OSError):  # of the machine, not of the file
        raise
    except Exception as error:  # exceptions of runtimes and compilers share no public base
        return f"{who} failed: {' '.join(str(error).split())[:300]}"


def in_order(found: Mapping[str, npt.NDArray[Any] | str], taps: Sequence[Mapping[str, Any]]) -> list[Found]:
    """Return the codes of each quantizer of ``taps``, in that order; or why there are none."""
    return [_codes(found[tap["tensor"]], tap) for tap in taps]


def _codes(stored: npt.NDArray[Any] | str, tap: Mapping[str, Any]) -> Found:
    """Return the codes of a tapped tensor: stored integers, or real values whose step is ``unit``."""
    if isinstance(stored, str):
        return stored
    if np.issubdtype(stored.dtype, np.integer):
        return np.asarray(stored - np.int64(tap["zero_point"]), np.int64)
    return as_codes(stored, tap.get("unit", tap["scale"]))
