"""Sums over all images: how two sets of logits differ, and the report that follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from export.parity.expected import Expected, Outputs, incomparable
from export.parity.graphs import GraphParity
from export.parity.layers import LayerTally, distance
from export.parity.report import Comparison, ParityReport
from export.parity.ways import Ways
from export.parity.with_provider import ProviderTally

Array = npt.NDArray[np.float32]


@dataclass
class Side:
    """Sums over images of one way of running the file.

    Args:
        expected: What the student requires of a correct file.
        optimized: Whether optimizations are on.
    """

    expected: Expected
    optimized: bool
    differing: int = 0
    ties: int = 0
    beyond: int = 0
    largest: float = 0.0
    total: float = 0.0
    allowed: float = 0.0
    right: int = 0
    fault: str = ""

    def add(self, ours: list[Array], theirs: Outputs, labels: npt.NDArray[np.int64] | None) -> None:
        """Add a batch: the student's outputs and the file's; the first ones are the logits."""
        self.fault = self.fault or incomparable(ours, theirs)
        if self.fault:
            return
        beyond = np.zeros(len(ours[0]), bool)
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            beyond |= self._add_output(one, np.asarray(other, np.float32), is_first=index == 0)
        self.beyond += int(beyond.sum())
        self._add_classes(ours[0], np.asarray(theirs[0], np.float32), labels)

    def _add_output(self, ours: Array, theirs: Array, *, is_first: bool) -> npt.NDArray[np.bool_]:
        """Return the images with a value that is too far off, or not finite."""
        difference = distance(ours, theirs)
        expected = self.expected if is_first else self.expected.of_other_outputs
        allowed = expected.allowed(ours, optimized=self.optimized)
        if is_first:
            self.allowed = max(self.allowed, allowed)
            self.largest = max(self.largest, float(difference.max(initial=0)))
            self.total += float(difference.sum())
        return np.asarray((difference > allowed).reshape(len(ours), -1).any(1))

    def _add_classes(self, ours: Array, theirs: Array, labels: npt.NDArray[np.int64] | None) -> None:
        mine, other = _classes(ours), _classes(theirs)
        differs = mine != other
        margin = _value_of(ours, mine) - _value_of(ours, other)
        is_tie = differs & (margin <= self.expected.tie(ours))
        by_image = differs.reshape(len(ours), -1)
        self.differing += int(by_image.any(1).sum())
        self.ties += int((by_image.any(1) & (by_image == is_tie.reshape(by_image.shape)).all(1)).sum())
        if labels is not None and other.shape == labels.shape:
            self.right += int((other == labels).sum())

    def comparison(self, images: int, values: int, step: float | None, *, has_labels: bool) -> Comparison:
        """Return what was found; if nothing could be compared, nothing agrees."""
        if self.fault:
            return Comparison(0.0, images, np.inf, np.inf, None, None, None, beyond=images, fault=self.fault)
        mean = self.total / values if values else np.inf
        return Comparison(
            top1_agreement=1 - self.differing / images,
            differing=self.differing,
            max_difference=self.largest,
            mean_difference=mean,
            max_steps=_steps(self.largest, step),
            mean_steps=_steps(mean, step),
            accuracy=self.right / images if has_labels else None,
            ties=self.ties,
            beyond=self.beyond,
            allowed=self.allowed,
        )


def _is_finite(outputs: list[Array]) -> bool:
    return all(bool(np.isfinite(output).all()) for output in outputs)


def _classes(logits: Array) -> npt.NDArray[np.int64]:
    """Return the best class of each image, or of each of its positions; a NaN wins."""
    return np.asarray(logits.argmax(1) if logits.ndim > 1 else np.zeros(len(logits)), np.int64)


def _value_of(logits: Array, classes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    if logits.ndim < 2:
        return logits.astype(np.float64)
    return np.take_along_axis(logits.astype(np.float64), np.expand_dims(classes, 1), 1).squeeze(1)


@dataclass
class Tally:
    """Sums over all images.

    Args:
        expected: What the student requires of a correct file.
    """

    expected: Expected
    images: int = 0
    labeled: int = 0
    right: int = 0
    logits: int = 0
    whole_beyond: int = 0
    is_zero: bool = True
    saw_values: bool = False
    classes: set[int] = field(default_factory=set)
    off: Side = field(init=False)
    on: Side = field(init=False)

    def __post_init__(self) -> None:
        self.off, self.on = Side(self.expected, optimized=False), Side(self.expected, optimized=True)

    def add(self, ours: list[Array], off: Outputs, on: Outputs, labels: Tensor | None, *, tapped: bool = False) -> None:
        """Add a batch: outputs of the student, and of the file with optimizations off and on.

        Args:
            ours: The student's outputs.
            off: The file's with optimizations off.
            on: The same with optimizations on.
            labels: Of the images ``[batch]``, or None.
            tapped: Whether each kernel also runs by itself on these images, so that the whole can be judged by them.
        """
        logits, wanted = ours[0], None if labels is None else labels.numpy()
        self.off.add(ours, off, wanted)
        self.on.add(ours, on, wanted)
        if tapped and not (isinstance(off, str) or self.off.fault or self.on.fault) and _is_finite(off):
            whole = Side(self.expected, optimized=False)
            whole.add(off, on, None)
            self.whole_beyond += whole.beyond
        self.images += len(logits)
        self.logits += logits.size
        self.is_zero = self.is_zero and not logits.any()
        found = _classes(logits)
        self.classes.update(np.unique(found).tolist())
        if wanted is not None and found.shape == wanted.shape:
            self.labeled += len(logits)
            self.right += int((found == wanted).sum())

    def report(
        self,
        layers: LayerTally,
        unmatched: dict[str, str],
        graphs: GraphParity,
        ways: Ways,
        provider: ProviderTally | None = None,
    ) -> ParityReport:
        """Return the report.

        Args:
            layers: Results for the codes.
            unmatched: Quantizers, or outputs, that student and file do not share, and why.
            graphs: Results for the constants.
            ways: What ran the file, with the notes on it.
            provider: Results with an execution provider; None if none was requested.

        Raises:
            ValueError: If no image was compared, or all of them are zero.
        """
        if not self.images:
            raise ValueError("there are no images to compare on: `batches` is empty")
        if not self.saw_values:
            raise ValueError("every image is all zeros, which proves nothing; compare on real ones")
        missing = {**unmatched, **(layers.uncompared() if layers.images else {})}
        has_labels, step = self.labeled == self.images, self.expected.output_step
        return ParityReport(
            images=self.images,
            off=self.off.comparison(self.images, self.logits, step, has_labels=has_labels),
            on=self.on.comparison(self.images, self.logits, step, has_labels=has_labels),
            output_step=step,
            accuracy=self.right / self.images if has_labels else None,
            layers=layers.rows(),
            output_steps_on=_steps(layers.output_difference, step) if layers.images else None,
            layer_images=layers.images,
            predicted_classes=len(self.classes),
            all_zero=self.is_zero,
            notes=(*ways.notes, *([graphs.note] if graphs.note else []), *self._notes(layers, missing)),
            runtime_version=ways.runtime_version,
            threads=ways.threads,
            output_differs_on=bool(layers.output_beyond),
            whole_differs_on=self.whole_beyond,
            uncompared=tuple(f"{name} ({why})" for name, why in missing.items()),
            constants=graphs.compared,
            differences=graphs.differences,
            provider=None if provider is None else provider.report(),
        )

    def _notes(self, layers: LayerTally, missing: dict[str, str]) -> Iterator[str]:
        if self.is_zero:
            yield "every logit is zero: this comparison proves nothing"
        elif len(self.classes) == 1:
            yield "the student predicts one class for all images: top-1 agreement proves little"
        for name, why in missing.items():
            yield f"{name}: its codes were not compared ({why})"
        if silent := layers.silent():
            yield f"all codes are zero, which proves nothing about them: {', '.join(silent)}"
        if not layers.images:
            yield "codes were not compared, only logits (layer_images=0)"


def _steps(difference: float, step: float | None) -> float | None:
    return None if step is None else difference / step
