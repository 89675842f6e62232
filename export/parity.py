"""Compare an exported graph with the student it came from, image by image and layer by layer.

``ParityError(RuntimeError)`` is raised by ``ParityReport.raise_if_worse`` and carries the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from export.codes import codes_in_order, device_of, evaluating, recorded_outputs
from export.layer_parity import Arrays, LayerParity, LayerTally, SingleLayers, in_order
from export.lowering import INPUT, OUTPUT
from export.quant_session import QuantSession
from export.runtime import load_model, open_session, runtime

Array = npt.NDArray[np.float32]
Batch = Tensor | Sequence[Tensor]
TAPPED_CHUNK = 16  # images a pass while every layer's codes are kept: bounds memory to some hundred MB at 224x224


class ParityError(RuntimeError):
    """An exported graph differs from its student by more than was allowed.

    Args:
        message: What differs, and by how much.
        report: The whole comparison.
    """

    def __init__(self, message: str, report: ParityReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class Comparison:
    """The student against one way of running the file.

    Args:
        top1_agreement: Share of images with the same best class, 0..1.
        differing: Images with another best class.
        max_difference: Largest absolute difference of two logits.
        mean_difference: Mean absolute difference.
        max_steps: ``max_difference`` in output steps; None where the output has no step.
        mean_steps: ``mean_difference`` in output steps; likewise.
        accuracy: Share of images whose best class is the label, 0..1; None without labels.
    """

    top1_agreement: float
    differing: int
    max_difference: float
    mean_difference: float
    max_steps: float | None
    mean_steps: float | None
    accuracy: float | None


@dataclass(frozen=True)
class ParityReport:
    """How an exported graph compares with its student.

    Args:
        images: Images compared.
        off: Against ONNX Runtime with optimisations off: is the export right?
        on: Against ONNX Runtime with optimisations on: what does a device compute?
        output_step: Real size of one step of the logits; None where the last layer has none.
        accuracy: The student's own, 0..1; None without labels.
        layers: Quantizers in order of computation, on the first ``layer_images`` images: student against file, and
            integer kernels one by one, fed the same codes.
        output_steps_on: Largest difference that the last layer's kernel alone makes, in output steps; None where the
            output has no step or layers were left out.
        layer_images: Images that layers were compared on.
        predicted_classes: How many different classes the student predicts; 1 proves little.
        all_zero: Whether every logit of the student is zero, which proves nothing.
        notes: What could not be compared, and what makes the comparison weak.
        runtime_version: Version of onnxruntime, or ``qonnx`` and its version where that ran the file.
        threads: Its threads.
    """

    images: int
    off: Comparison
    on: Comparison
    output_step: float | None
    accuracy: float | None
    layers: tuple[LayerParity, ...]
    output_steps_on: float | None
    layer_images: int
    predicted_classes: int
    all_zero: bool
    notes: tuple[str, ...]
    runtime_version: str
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    def raise_if_worse(self, *, min_top1_off: float = 1.0, min_top1_on: float = 0.999) -> None:
        """Raise unless the top-1 agreement is good enough.

        Args:
            min_top1_off: Least agreement with optimisations off, 0..1.
            min_top1_on: Least agreement with optimisations on, 0..1.

        Raises:
            ParityError: If an agreement is below its bound, or every logit is zero. Carries this report.
        """
        faults = [
            f"optimisations {name}: {compared.differing} of {self.images} images get another class "
            f"(agreement {compared.top1_agreement:.4%}, at least {least:.4%} wanted)"
            for name, compared, least in (("off", self.off, min_top1_off), ("on", self.on, min_top1_on))
            if compared.top1_agreement < least
        ]
        first = next((layer for layer in self.layers if layer.differing), None)
        if faults and first is not None:
            faults.append(f"the first layer that differs is {first.name} ({first.differing} of {first.values} codes)")
        if self.all_zero:
            faults.append("every logit is zero, which proves nothing: compare a trained student on real images")
        if faults:
            raise ParityError("; ".join(faults), self)


def check_parity(
    student: nn.Module,
    path: str | PathLike[str],
    batches: Iterable[Batch],
    *,
    threads: int = 1,
    layer_images: int = 256,
) -> ParityReport:
    """Run the student and its file on the same images, and compare classes, logits and codes.

    The student runs in evaluation mode, which is its deployed arithmetic, and is left as it was. ONNX Runtime runs
    the file twice: optimisations off (float arithmetic between quantizers, which is what the file says) and on (the
    integer kernels a device uses). The codes of every quantizer are compared with optimisations off; then the kernels
    between two quantizers run by themselves on those codes, so that no difference comes from an earlier layer. A
    ``qonnx`` file is run by qonnx's own executor instead, node by node (slow), and ``on`` repeats ``off``.

    Args:
        student: What the file was exported from.
        path: A file that ``export_onnx`` wrote.
        batches: Normalised float images ``[batch, channels, height, width]``, or pairs ``(images, labels)``; labels
            ``[batch]`` give accuracies, too. Images with all values zero prove nothing, so they are an error.
        threads: ONNX Runtime's threads, at least 1.
        layer_images: So many images at most are compared layer by layer; 0 leaves layers out.

    Raises:
        ValueError: If there are no images, all of them are zero or of another shape than the file takes, some value is
            not finite, labels do not fit, or the file is damaged or was not written by ``export_onnx``.
        FileNotFoundError: If there is no file at ``path``.
        ImportError: If onnxruntime is missing, or qonnx for a ``qonnx`` file.
    """
    ways = _Ways(path, threads)
    tally, layers = _Tally(), LayerTally(ways.taps)
    with evaluating(student):
        for images, labels in _pairs(batches):
            ways.check_shape(images)
            for part, part_labels, tapped in _parts(images, labels, layer_images - layers.images):
                logits, off = _run_student(student, part, ways, layers if tapped else None)
                tally.add(logits, off, ways.run(ways.on, part), part_labels)
                tally.saw_values |= bool(part.any())
    return tally.report(ways, layers, threads)


class _Ways:
    """The file, opened in the ways that it is compared."""

    def __init__(self, path: str | PathLike[str], threads: int) -> None:
        model = load_model(path)
        self.properties = {entry.key: entry.value for entry in model.metadata_props}
        if "quantizers" not in self.properties:
            raise ValueError(f"{path} says nothing of its quantizers; compare a file that export_onnx wrote")
        self.taps: list[dict[str, Any]] = json.loads(self.properties["quantizers"])
        self.tensors = list(dict.fromkeys(tap["tensor"] for tap in self.taps))
        self.notes: tuple[str, ...] = ()
        self.single: SingleLayers | None = None
        if self.properties.get("flavour") == "qonnx":
            session = QuantSession(path)
            self.off = self.on = self.tapped = session
            self.runtime_version = f"qonnx {session.version}"
            self.notes = ("run by qonnx's executor, which has no optimisations: `on` repeats `off`",)
        else:
            self.off = open_session(path, optimise=False, threads=threads)
            self.on = open_session(path, optimise=True, threads=threads)
            self.tapped = open_session(_exposed(model, self.taps), optimise=False, threads=threads)
            self.single = SingleLayers(model, self.tensors, [INPUT], OUTPUT, threads)
            self.runtime_version = str(runtime().__version__)

    @property
    def output_step(self) -> float | None:
        return float(self.properties["output_step"]) if "output_step" in self.properties else None

    def check_shape(self, images: Tensor) -> None:
        wanted = self.off.get_inputs()[0].shape[1:]  # without the batch
        if any(isinstance(size, int) for size in wanted) and list(images.shape[1:]) != list(wanted):
            raise ValueError(f"images are {list(images.shape[1:])}, but the file takes {list(wanted)}, batch apart")

    def run(self, session: Any, images: Tensor) -> Array:
        return np.asarray(session.run([OUTPUT], {INPUT: images.numpy()})[0])

    def run_tapped(self, images: Tensor) -> tuple[Arrays, Arrays]:
        """Return images, logits and what every quantizer gives, by tensor: of the file, and of its kernels alone."""
        found = self.tapped.run([OUTPUT, *self.tensors], {INPUT: images.numpy()})
        off = {INPUT: images.numpy(), **dict(zip([OUTPUT, *self.tensors], found, strict=True))}
        return off, off if self.single is None else self.single.run(off)


def _exposed(model: onnx.ModelProto, taps: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a copy of the model that also gives the tapped tensors out."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    types = {str(tap["tensor"]): TensorProto.DataType.Value(tap.get("type", "UINT8")) for tap in taps}
    copy.graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in types.items())
    return bytes(copy.SerializeToString())


def _pairs(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor | None]]:
    for number, batch in enumerate(batches):
        images, labels = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
        if not images.is_floating_point() or images.dim() < 2:
            raise ValueError(f"batch {number}: images must be normalised floats, found {images.dtype}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"batch {number}: {list(labels.shape)} labels for {list(images.shape)} images")
        if not torch.isfinite(images).all():
            raise ValueError(f"batch {number}: an image holds a value that is not finite")
        yield images.float().cpu().contiguous(), None if labels is None else labels.cpu()


def _parts(images: Tensor, labels: Tensor | None, tapped: int) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """Cut a batch into small parts whose layers are compared, until ``tapped`` images have been, and the rest."""
    start, count = 0, len(images)
    while start < count:
        is_tapped = start < tapped
        end = min(start + TAPPED_CHUNK, tapped, count) if is_tapped else count
        yield images[start:end], None if labels is None else labels[start:end], is_tapped
        start = end


def _run_student(student: nn.Module, images: Tensor, ways: _Ways, layers: LayerTally | None) -> tuple[Array, Array]:
    """Return the logits of the student, and of the file with optimisations off; compare layers where asked to."""
    inputs = images.to(device_of(student))
    if layers is None:
        return _logits(student(inputs)), ways.run(ways.off, images)
    with recorded_outputs(student, [tap["name"] for tap in ways.taps]) as outputs:
        logits = _logits(student(inputs))
    off, on = ways.run_tapped(images)
    codes = codes_in_order(outputs, [(tap["name"], tap["scale"]) for tap in ways.taps])
    layers.add(codes, in_order(off, ways.taps), in_order(on, ways.taps), len(images))
    layers.saw_output(off[OUTPUT], on[OUTPUT])
    return logits, off[OUTPUT]


def _logits(output: Any) -> Array:
    first = output[0] if isinstance(output, (tuple, list)) else output
    values = cast(Tensor, getattr(first, "value", first))
    return np.asarray(values.detach().float().cpu().numpy())


@dataclass
class _Side:
    """Sums over images of one way of running the file."""

    agreeing: int = 0
    largest: float = 0.0
    total: float = 0.0
    right: int = 0

    def add(self, logits: Array, theirs: Array, labels: npt.NDArray[np.int64] | None) -> None:
        difference = np.abs(logits.astype(np.float64) - theirs)
        self.agreeing += int((logits.argmax(1) == theirs.argmax(1)).sum())
        self.largest = max(self.largest, float(difference.max(initial=0)))
        self.total += float(difference.sum())
        self.right += 0 if labels is None else int((theirs.argmax(1) == labels).sum())


@dataclass
class _Tally:
    """Sums over all images."""

    images: int = 0
    labelled: int = 0
    right: int = 0
    logits: int = 0
    is_zero: bool = True
    saw_values: bool = False
    classes: set[int] = field(default_factory=set)
    off: _Side = field(default_factory=_Side)
    on: _Side = field(default_factory=_Side)

    def add(self, logits: Array, off: Array, on: Array, labels: Tensor | None) -> None:
        wanted = None if labels is None else labels.numpy()
        self.off.add(logits, off, wanted)
        self.on.add(logits, on, wanted)
        self.images += len(logits)
        self.logits += logits.size
        self.is_zero = self.is_zero and not logits.any()
        self.classes.update(logits.argmax(1).tolist())
        if wanted is not None:
            self.labelled += len(logits)
            self.right += int((logits.argmax(1) == wanted).sum())

    def report(self, ways: _Ways, layers: LayerTally, threads: int) -> ParityReport:
        if not self.images:
            raise ValueError("there are no images to compare on: `batches` is empty")
        if not self.saw_values:
            raise ValueError("every image is all zeros, which proves nothing; compare on real ones")
        return ParityReport(
            images=self.images,
            off=self._comparison(self.off, ways.output_step),
            on=self._comparison(self.on, ways.output_step),
            output_step=ways.output_step,
            accuracy=self._accuracy(self.right),
            layers=layers.rows(),
            output_steps_on=_steps(layers.output_difference, ways.output_step) if layers.images else None,
            layer_images=layers.images,
            predicted_classes=len(self.classes),
            all_zero=self.is_zero,
            notes=(*ways.notes, *self._notes(layers)),
            runtime_version=ways.runtime_version,
            threads=threads,
        )

    def _accuracy(self, right: int) -> float | None:
        return right / self.images if self.labelled == self.images else None

    def _comparison(self, side: _Side, step: float | None) -> Comparison:
        mean = side.total / self.logits
        return Comparison(
            top1_agreement=side.agreeing / self.images,
            differing=self.images - side.agreeing,
            max_difference=side.largest,
            mean_difference=mean,
            max_steps=_steps(side.largest, step),
            mean_steps=_steps(mean, step),
            accuracy=self._accuracy(side.right),
        )

    def _notes(self, layers: LayerTally) -> Iterator[str]:
        if self.is_zero:
            yield "every logit is zero: this comparison proves nothing"
        elif len(self.classes) == 1:
            yield "the student predicts one class for all images: top-1 agreement proves little"
        for name, why in layers.missing.items():
            yield f"{name}: its codes were not compared ({why})"


def _steps(difference: float, step: float | None) -> float | None:
    return None if step is None else difference / step
