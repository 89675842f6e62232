"""Compare a file in the runtime that it was written for with the student, whole and layer by layer.

A runtime fuses what it sees, so a tensor that is an output next to the logits may be computed differently. Each layer
is therefore compared in a separate graph, which runs from the image to that layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from export.lowering.model import INPUT
from export.parity.expected import Expected, incomparable
from export.parity.layers import attempted, distance
from export.parity.with_provider import ending_at
from export.runtime import open_session
from export.targets.sessions import Session, open_in, require_known

LAYER_IMAGES = 4  # one graph per layer, which some runtimes take seconds to compile
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RuntimeLayer:
    """The codes of one quantizer in another runtime.

    Args:
        name: The quantizer's module path.
        values: Codes compared.
        differing: Those that differ from the student's.
        fault: Why it could not be compared; empty if it was.
    """

    name: str
    values: int
    differing: int
    fault: str = ""


@dataclass(frozen=True)
class RuntimeParity:
    """A file in a runtime other than ONNX Runtime, compared with the student.

    Args:
        runtime: Its name and version.
        images: Images whose logits were compared.
        beyond: Images with a logit that is further from the student's than one function may be.
        max_difference: Largest difference of two values of an output.
        layers: One row per quantizer, on the first ``layer_images`` images.
        layer_images: Images that layers were compared on.
        fault: Why logits could not be compared; empty if they were.
    """

    runtime: str
    images: int
    beyond: int
    max_difference: float
    layers: tuple[RuntimeLayer, ...] = ()
    layer_images: int = 0
    fault: str = ""

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the runtime is not shown to compute the student; empty if it is."""
        found = [self.fault] if self.fault else []
        if self.beyond and not self.fault:
            found.append(f"logits of {self.beyond} of {self.images} images differ by up to {self.max_difference:.4g}")
        wrong = [layer for layer in self.layers if layer.differing or layer.fault]
        if wrong:
            what = wrong[0].fault or f"{wrong[0].differing} of {wrong[0].values} codes"
            found.append(f"{len(wrong)} of {len(self.layers)} quantizers differ; the first is {wrong[0].name} ({what})")
        return tuple(f"{self.runtime}: {text}" for text in found)

    @property
    def sentence(self) -> str:
        """The comparison in one sentence."""
        codes = sum(layer.values for layer in self.layers)
        what = f"logits of {self.images} images, {codes:,} codes of {len(self.layers)} quantizers"
        return f"{self.runtime}: {what} {'FAILED' if self.faults else 'equal to the student'}"


class RuntimeTally:
    """Sums over images of a file's outputs in another runtime.

    Args:
        model: The file.
        runtime: A name that ``open_in`` takes.
        taps: Its quantizers: ``name`` and ``tensor``.
        outputs: Names of the outputs that are compared; the logits come first.
        threads: Threads of the runtime.
        expected: How far apart logits may be.

    Raises:
        ValueError: If the runtime is unknown.
        ImportError: If it is not installed.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        runtime: str,
        taps: Sequence[Mapping[str, Any]],
        outputs: Sequence[str],
        threads: int,
        expected: Expected,
    ) -> None:
        self.model, self.runtime, self.taps, self.threads = model, runtime, taps, threads
        self.outputs, self.expected = list(outputs), expected
        self.title, self.fault = runtime, ""
        self.session: Session | None = None
        require_known(runtime)
        try:
            self.session = open_in(runtime, model.SerializeToString(), threads)
            self.title = self.session.version
        except (ImportError, OSError):  # not the file's fault
            raise
        except Exception as error:  # what its compiler raises
            self.fault = f"it does not load the file: {' '.join(str(error).split())[:300]}"
        self.images = self.beyond = 0
        self.largest = 0.0
        self.kept: list[Array] = []

    def add(self, images: Array, ours: Sequence[Array], *, keep: bool) -> None:
        """Add a batch.

        Args:
            images: As the file takes them.
            ours: Outputs of the student.
            keep: Whether layers may be compared on these images.
        """
        self.images += len(images)
        kept = sum(map(len, self.kept))
        if keep and kept < LAYER_IMAGES:
            self.kept.append(images[: LAYER_IMAGES - kept])
        found = (
            self.fault if self.session is None else attempted(self.session.run, self.outputs, {INPUT: images}, who="it")
        )
        self.fault = self.fault or incomparable(ours, found)
        if self.fault or isinstance(found, str):
            self.beyond += len(images)
            return
        beyond = np.zeros(len(images), bool)
        for index, (one, other) in enumerate(zip(ours, found, strict=True)):
            apart = distance(one, np.asarray(other, np.float32))
            self.largest = max(self.largest, float(apart.max(initial=0)))
            expected = self.expected if index == 0 else self.expected.of_other_outputs
            beyond |= (apart > expected.allowed(one, optimized=False)).reshape(len(images), -1).any(1)
        self.beyond += int(beyond.sum())

    def report(self) -> RuntimeParity:
        """Compare the layers, and return all results."""
        images = np.concatenate(self.kept) if self.kept and self.session is not None else None
        rows = () if images is None else tuple(self._row(tap, images) for tap in self.taps)
        count = 0 if images is None else len(images)
        return RuntimeParity(self.title, self.images, self.beyond, self.largest, rows, count, self.fault)

    def _row(self, tap: Mapping[str, Any], images: Array) -> RuntimeLayer:
        name, tensor = str(tap["name"]), str(tap["tensor"])
        part = _shaped(ending_at(self.model, tensor, str(tap.get("type", "UINT8")))[0])
        plain = open_session(part, optimize=False, threads=self.threads).run([tensor], {INPUT: images})[0]
        found = attempted(lambda: open_in(self.runtime, part, self.threads).run([tensor], {INPUT: images}), who="it")
        if isinstance(found, str):
            return RuntimeLayer(name, 0, 0, found)
        if np.shape(found[0]) != plain.shape:
            return RuntimeLayer(name, 0, 0, f"shape {list(np.shape(found[0]))}, but {list(plain.shape)} in the student")
        step = float(tap["scale"]) if plain.dtype == np.float32 else 1.0  # real values of a grid, or its codes
        differs = distance(plain, found[0]) > step / 2
        return RuntimeLayer(name, plain.size, int(differs.sum()))


def _shaped(part: bytes) -> bytes:
    """Return a part of a model with the shape of its output filled in, which some runtimes need."""
    model = onnx.load_from_string(part)
    inferred = onnx.shape_inference.infer_shapes(model)
    del model.graph.output[:]
    model.graph.output.extend(inferred.graph.output)
    return bytes(model.SerializeToString())
