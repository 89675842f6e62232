"""A student's file, opened in each way that it is compared: optimizations off, on, and cut at its quantizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from torch import Tensor

from export.codes import Found
from export.devices.onboard import runner
from export.lowering.model import INPUT
from export.parity.expected import Expected, Tap
from export.parity.layers import SingleLayers, attempted, in_order
from export.parity.quant_session import QuantSession
from export.parity.with_provider import ProviderTally
from export.parity.with_runtime import RuntimeTally
from export.runtime import load_model, open_session, runtime
from export.storage.metadata import as_a_file, check_structure, properties_of, read_property
from export.storage.preprocessing import Preprocessing
from export.versions import arithmetic_note

Array = npt.NDArray[np.float32]
TAP_KEYS = {"name": str, "tensor": str, "scale": float, "zero_point": int}


class Ways:
    """The file, and sessions on it.

    Args:
        path: A file that ``export_onnx`` wrote.
        threads: ONNX Runtime's threads.
        preprocessing: How its images are preprocessed, according to the caller.

    Raises:
        ValueError: If it is damaged, does not list its quantizers, or takes pixels where ``preprocessing`` says that
            it does not, or vice versa.
        FileNotFoundError: If there is no such file.
        ImportError: If what runs it is missing.
    """

    def __init__(self, path: str | PathLike[str], threads: int, preprocessing: Preprocessing | None = None) -> None:
        self.model = load_model(path)
        self.pixels = preprocessing if preprocessing is not None and preprocessing.is_inside else None
        _require_same_input(path, self.model, is_inside=self.pixels is not None)
        self.path, self.threads = path, threads
        with as_a_file(path, "to compare it"):
            check_structure(self.model)
            self.properties = properties_of(self.model)
        self.all_taps = _read_taps(path, self.model)
        self.outputs = [entry.name for entry in self.model.graph.output]
        self.notes: tuple[str, ...] = ()
        self.taps: list[dict[str, Any]] = []
        self.expected: list[Tap] = []
        self.single: SingleLayers | None = None
        self.is_qonnx = self.properties.get("flavor") == "qonnx"
        if self.is_qonnx:
            session: Any = QuantSession(path)
            self.off = self.on = session
            self.runtime_version = f"qonnx {session.version}"
            self.notes = ("run by qonnx's executor, which has no optimizations: `on` repeats `off`",)
        else:
            self.off = open_session(path, optimize=False, threads=threads)
            # a file that loads here and not there is a finding, not an input error
            self.on = attempted(lambda: open_session(path, optimize=True, threads=threads))
            self.runtime_version = str(runtime().__version__)
            note = arithmetic_note(self.runtime_version, runner.machine()["cpu_flags"])
            self.notes = (note,) if note else ()

    def match(self, expected: Expected) -> Iterator[tuple[str, str]]:
        """Keep the outputs and quantizers that student and file share; yield every other one, and why it is left out.

        Raises:
            ValueError: If the file lacks the first output, the logits.
        """
        yield from self._match_outputs(expected.outputs)
        left = _by_call(expected.taps)
        tensors = {name for node in self.model.graph.node for name in node.output}
        for key, tap in zip(_calls([tap["name"] for tap in self.all_taps]), self.all_taps, strict=True):
            wanted = left.pop(key, None)
            if why := _mismatch(tap, wanted, tensors):
                yield str(tap["name"]), why
            if wanted is not None and tap["tensor"] in tensors:
                self.taps.append(tap)
                self.expected.append(wanted)
        for name, _ in left:
            yield name, "the file does not list this quantizer, or lists fewer of its calls"
        self._open_cut()

    def _match_outputs(self, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Keep the outputs that student and file share, by name, in the student's order."""
        found = self.outputs
        if wanted[0] not in found:
            raise ValueError(
                f"{self.path}: it gives {found}, but not {wanted[0]!r}; compare a file that export_onnx wrote of this "
                "student"
            )
        self.outputs = [name for name in wanted if name in found]
        for name in wanted:
            if name not in found:
                yield f"output {name!r}", "the file has no such output"
        for name in found:
            if name not in wanted:
                yield f"output {name!r}", "the student has no such output"

    def _open_cut(self) -> None:
        tensors = self.tensors
        if self.is_qonnx:
            self.tapped = self.off
        else:
            self.tapped = open_session(_exposed(self.model, self.taps), optimize=False, threads=self.threads)
            self.single = SingleLayers(self.model, tensors, [INPUT], self.outputs[0], self.threads)

    def with_provider(self, provider: str) -> ProviderTally:
        """Return what compares the file under an execution provider, once student and file are matched.

        Raises:
            ValueError: If the provider is not available, or another program than ONNX Runtime runs the file.
        """
        if self.is_qonnx:
            raise ValueError(f"{self.path}: provider={provider!r} needs ONNX Runtime, which does not run qonnx files")
        return ProviderTally(self.model, self.path, provider, self.taps, self.outputs, self.threads)

    def in_runtime(self, runtime: str, expected: Expected) -> RuntimeTally:
        """Return what compares the file in another runtime, once student and file are matched.

        Raises:
            ValueError: If the runtime is unknown, or cannot read the file's operators.
            ImportError: If it is not installed.
        """
        if self.is_qonnx:
            raise ValueError(f"{self.path}: runtime={runtime!r} reads ONNX's own operators, which a qonnx file lacks")
        return RuntimeTally(self.model, runtime, self.taps, self.outputs, self.threads, expected)

    @property
    def tensors(self) -> list[str]:
        """Return the tensors in which the file keeps the codes of its quantizers."""
        return list(dict.fromkeys(tap["tensor"] for tap in self.taps))

    def check_shape(self, images: Tensor) -> None:
        """Refuse images that the file does not take.

        Raises:
            ValueError: If they differ; the message gives both shapes.
        """
        wanted = self.off.get_inputs()[0].shape[1:]  # without the batch
        if self.pixels is not None:
            wanted = [self.pixels.channels, *self.pixels.image_size]
        if any(isinstance(size, int) for size in wanted) and list(images.shape[1:]) != list(wanted):
            raise ValueError(f"images are {list(images.shape[1:])}, but the file takes {list(wanted)} (batch apart)")

    def run(self, session: Any, images: Tensor) -> list[Array] | str:
        """Return the outputs, in order; or the runtime's message if it fails."""
        if isinstance(session, str):
            return session
        found = attempted(session.run, self.outputs, {INPUT: self.fed(images)})
        if isinstance(found, str):
            return found
        values = [np.asarray(value) for value in found]
        return next(_undeclared(self.model, dict(zip(self.outputs, values, strict=True))), values)

    def run_tapped(self, images: Tensor) -> Tapped | str:
        """Return what the file gives with optimizations off, and what its kernels give alone; or why it cannot run."""
        names = [*self.outputs, *(name for name in self.tensors if name not in self.outputs)]
        fed = self.fed(images)
        values = attempted(self.tapped.run, names, {INPUT: fed})
        if isinstance(values, str):
            return values
        found = {INPUT: fed, **dict(zip(names, values, strict=True))}
        alone = found if self.single is None else self.single.run(found)
        return Tapped(
            [np.asarray(found[name]) for name in self.outputs], in_order(found, self.taps), in_order(alone, self.taps),
            alone[self.outputs[0]],
        )  # fmt: skip

    def fed(self, images: Tensor) -> npt.NDArray[Any]:
        """Return images as the file takes them."""
        return np.asarray(images.numpy() if self.pixels is None else self.pixels.as_fed(images.numpy()))


def _undeclared(model: onnx.ModelProto, found: Mapping[str, npt.NDArray[Any]]) -> Iterator[str]:
    """Yield each output of another shape than the file says, which is what its readers allocate memory by."""
    for entry in model.graph.output:
        kind = entry.type.tensor_type
        if entry.name not in found or not kind.HasField("shape"):
            continue
        says, gives = [size.dim_value for size in kind.shape.dim], list(found[entry.name].shape)
        pairs = zip(says[1:], gives[1:], strict=False)  # without the batch; 0: of any size
        if len(says) != len(gives) or any(size not in (0, real) for size, real in pairs):
            yield f"the file says that its output {entry.name!r} is {_end(entry)}, but it gives {gives}"


def _end(entry: onnx.ValueInfoProto) -> str:
    return "[" + ", ".join(size.dim_param or str(size.dim_value) for size in entry.type.tensor_type.shape.dim) + "]"


class Tapped:
    """Outputs and codes of a batch.

    Args:
        outputs: With optimizations off.
        off: Codes of each quantizer with optimizations off.
        alone: Codes of each kernel by itself.
        output_alone: The first output, from the last kernel by itself; or why there is none.
    """

    def __init__(
        self, outputs: list[Array], off: list[Found], alone: list[Found], output_alone: npt.NDArray[Any] | str
    ) -> None:
        self.outputs, self.off, self.alone, self.output_alone = outputs, off, alone, output_alone


def _require_same_input(path: str | PathLike[str], model: onnx.ModelProto, *, is_inside: bool) -> None:
    takes_pixels = any(entry.type.tensor_type.elem_type == TensorProto.UINT8 for entry in model.graph.input)
    if takes_pixels and not is_inside:
        raise ValueError(f"{path}: it takes uint8 pixels; say how they are normalized (preprocessing=...)")
    if is_inside and not takes_pixels:
        raise ValueError(f"{path}: it takes normalized images, but `preprocessing` claims to be inside it")


def _read_taps(path: str | PathLike[str], model: onnx.ModelProto) -> list[dict[str, Any]]:
    if all(entry.key != "quantizers" for entry in model.metadata_props):
        raise ValueError(f"{path} does not list its quantizers; compare a file that export_onnx wrote")
    try:
        taps: list[dict[str, Any]] = read_property(model, "quantizers", [])
        is_whole = all(isinstance(tap[key], kind) for tap in taps for key, kind in TAP_KEYS.items())
    except (ValueError, TypeError, KeyError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{path}: its list of quantizers is damaged; export it again")
    return list(taps)


def _calls(names: Sequence[str]) -> list[tuple[str, int]]:
    """Return each name and how often it occurred before."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        found.append((name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return found


def _by_call(taps: Sequence[Tap]) -> dict[tuple[str, int], Tap]:
    return dict(zip(_calls([tap.name for tap in taps]), taps, strict=True))


def _mismatch(tap: Mapping[str, Any], wanted: Tap | None, tensors: set[str]) -> str:
    if wanted is None:
        return "the student has no such quantizer, or calls it less often"
    if tap["tensor"] not in tensors:
        return f"the file has no tensor {tap['tensor']!r}"
    if tap["scale"] != wanted.scale:
        return f"its scale is {tap['scale']:.9g} in the file, {wanted.scale:.9g} in the student"
    return ""


def _exposed(model: onnx.ModelProto, taps: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a copy of the model that also gives the tapped tensors out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    outputs = {entry.name for entry in model.graph.output}
    types = {str(tap["tensor"]): TensorProto.DataType.Value(tap.get("type", "UINT8")) for tap in taps}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, kind, None) for name, kind in types.items() if name not in outputs
    )
    return bytes(copy.SerializeToString())
