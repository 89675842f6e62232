"""What a comparison found, and the one rule by which it passes or fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from export.parity.layers import LayerParity
from export.parity.with_provider import ProviderParity
from export.parity.with_runtime import RuntimeParity

MIN_TOP1_OFF = 1.0  # the file must do what the student does, image by image
# With optimizations on a kernel may round a tie the other way, on an image that was not compared layer by layer.
MIN_TOP1_ON = 0.999
MIN_WITHIN_ON = 0.999
NAMED = 3  # faults of one kind that are named; the others are only counted


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
    """Comparison of the student with one way of running the file.

    Args:
        top1_agreement: Share of images with the same best class, 0..1.
        differing: Images with another best class.
        max_difference: Largest absolute difference of two logits; infinite if one is not finite, or there was
            nothing to compare (None in JSON).
        mean_difference: Mean absolute difference; likewise.
        max_steps: ``max_difference`` in output steps; None if the output has no step.
        mean_steps: ``mean_difference`` in output steps; likewise.
        accuracy: Share of images whose best class is the label, 0..1; None without labels.
        ties: Images among ``differing`` whose two classes have equal logits in the student, float rounding aside:
            neither order is wrong.
        beyond: Images with a logit that is further from the student's than ``allowed``, or not finite.
        allowed: Largest difference of two logits that one function may have here (see ``export.parity.expected``).
        fault: Why logits could not be compared; empty if they were.
    """

    top1_agreement: float
    differing: int
    max_difference: float
    mean_difference: float
    max_steps: float | None
    mean_steps: float | None
    accuracy: float | None
    ties: int = 0
    beyond: int = 0
    allowed: float | None = None
    fault: str = ""


@dataclass(frozen=True)
class ParityReport:
    """How an exported graph compares with its student.

    Args:
        images: Images compared.
        off: Against ONNX Runtime with optimizations off: is the export right?
        on: Against ONNX Runtime with optimizations on: what does a device compute?
        output_step: Real size of one step of the student's logits; None if the last layer has none.
        accuracy: The student's own, 0..1; None without labels.
        layers: Quantizers in order of computation, on the first ``layer_images`` images: student against file, and
            integer kernels one by one, fed the same codes.
        output_steps_on: Largest difference that the last layer's kernel alone makes, in output steps; None if the
            output has no step or layers were left out.
        layer_images: Images that layers were compared on.
        predicted_classes: How many different classes the student predicts; 1 proves little.
        all_zero: Whether every logit of the student is zero, which proves nothing.
        notes: What could not be compared, and what makes the comparison weak.
        runtime_version: Version of onnxruntime, or ``qonnx`` and its version if that ran the file.
        threads: Its threads.
        output_differs_on: Whether the last layer's kernel alone makes a larger difference than allowed.
        whole_differs_on: Images, of those that layers were compared on, for which the whole file with optimizations on
            gives other logits than without, beyond their rounding.
        uncompared: Each quantizer, layer or output that had to be compared but could not be, and why.
        constants: Constants, attributes and entries of the file that were compared with the student's; 0 if they
            were not (a note says why): then ``passed`` covers only these images.
        differences: Each node, attribute or constant of the file that differs from what export writes for the student.
        provider: The file under an execution provider against the same file without it, if requested.
        runtime: The file in another runtime against the student, if requested.
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
    output_differs_on: bool = False
    whole_differs_on: int = 0
    uncompared: tuple[str, ...] = ()
    constants: int = 0
    differences: tuple[str, ...] = ()
    provider: ProviderParity | None = None
    runtime: RuntimeParity | None = None

    @property
    def passed(self) -> bool:
        """Whether the file is the student, so that ``faults`` is empty.

        If constants were compared (``constants`` is not 0), this holds for any images; otherwise only for these.
        """
        return not self.faults

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the file is not proven to be the student; empty if it is.

        With optimizations off, every logit of every image must be within its rounding of the student's, and the best
        class the same (except for ties in the student itself). Every quantizer of student and file must have been
        compared, and no code may differ, nor any code of an integer kernel that is fed the codes it should get. With
        optimizations on, one image in a thousand may get logits farther off than one code of the last layer's input
        moves them, and one another class; but if no kernel by itself gives another code, nor may the whole. Logits that
        are all zero, or never finite, prove nothing. Nothing in the file may differ from what export writes for the
        student, whether or not these images reach it. Under an execution provider, if one was requested, no bit of an
        output or a layer may differ, and the provider must compute some of the file. In another runtime, if one was
        requested, logits and codes are judged as with optimizations off.
        """
        return tuple(self._faults(MIN_TOP1_OFF, MIN_TOP1_ON, None, None))

    def to_json(self) -> dict[str, Any]:
        """Return the fields, ``passed`` and ``faults`` as plain values; infinite values become None."""
        values = asdict(self)
        for side in ("off", "on"):
            values[side] = {key: _finite(value) for key, value in values[side].items()}
        values["output_steps_on"] = _finite(self.output_steps_on)
        if self.provider is not None:
            values["provider"]["faults"] = list(self.provider.faults)
        if self.runtime is not None:
            values["runtime"]["faults"] = list(self.runtime.faults)
            values["runtime"]["max_difference"] = _finite(self.runtime.max_difference)
        return {**values, "passed": self.passed, "faults": list(self.faults)}

    def raise_if_worse(
        self,
        *,
        min_top1_off: float = MIN_TOP1_OFF,
        min_top1_on: float = MIN_TOP1_ON,
        max_steps_off: float | None = None,
        max_steps_on: float | None = None,
    ) -> None:
        """Raise unless the file is proven to be the student; without arguments, unless ``passed``.

        Args:
            min_top1_off: Minimum agreement of classes with optimizations off, 0..1.
            min_top1_on: The same with optimizations on.
            max_steps_off: Maximum difference of two logits with optimizations off, in output steps; None for what
                ``faults`` says, infinity for any.
            max_steps_on: The same with optimizations on.

        Raises:
            ParityError: If there is a fault (see ``faults``) by these bounds. Carries this report.
        """
        faults = list(self._faults(min_top1_off, min_top1_on, max_steps_off, max_steps_on))
        if faults:
            raise ParityError("; ".join(faults), self)

    def _faults(
        self, min_top1_off: float, min_top1_on: float, max_steps_off: float | None, max_steps_on: float | None
    ) -> Iterator[str]:
        if not self.images:
            yield "no image was compared"
            return
        yield from self._side_faults("off", self.off, min_top1_off, max_steps_off, min_within=1.0)
        yield from self._side_faults("on", self.on, min_top1_on, max_steps_on, min_within=MIN_WITHIN_ON)
        yield from _some("could not be compared", self.uncompared)
        yield from self._code_faults(judges_whole=max_steps_on is None)
        yield from _some("the file differs from what export writes for this student", self.differences)
        if self.all_zero:
            yield "every logit is zero, which proves nothing: compare a trained student on real images"
        yield from self.provider.faults if self.provider is not None else ()
        yield from self.runtime.faults if self.runtime is not None else ()

    def _side_faults(
        self, name: str, side: Comparison, least: float, most_steps: float | None, *, min_within: float
    ) -> Iterator[str]:
        if side.fault:
            yield f"optimizations {name}: {side.fault}"
            return
        agreement = 1 - (side.differing - side.ties) / self.images
        if agreement < least:
            ties = f", {side.ties} more where the student's own two best logits are equal" if side.ties else ""
            yield (
                f"optimizations {name}: {side.differing - side.ties} of {self.images} images get another class{ties} "
                f"(agreement {agreement:.4%}, at least {least:.4%} required)"
            )
        if most_steps is None:
            if 1 - side.beyond / self.images < min_within:
                yield f"optimizations {name}: logits of {side.beyond} of {self.images} images differ{self._size(side)}"
        elif side.max_steps is not None and side.max_steps > most_steps:
            found = f"logits differ by {side.max_steps:.4g} output steps"
            yield f"optimizations {name}: {found}, at most {most_steps:g} allowed"

    def _size(self, side: Comparison) -> str:
        if math.isinf(side.max_difference):
            return ", some not finite"
        if side.max_steps is None or side.allowed is None or not self.output_step:
            return f" by up to {side.max_difference:.4g}, at most {side.allowed or 0:.4g} allowed"
        return f" by up to {side.max_steps:.4g} output steps, at most {side.allowed / self.output_step:.4g} allowed"

    def _code_faults(self, *, judges_whole: bool) -> Iterator[str]:
        differing = [layer for layer in self.layers if layer.differing]
        if differing:
            first = differing[0]
            yield (
                f"codes of {len(differing)} of {len(self.layers)} quantizers differ; the first layer that differs is "
                f"{first.name} ({first.differing} of {first.values} codes)"
            )
        kernels = [f"{layer.name} ({layer.differing_on} of {layer.values} codes)"
                   for layer in self.layers if layer.differing_on]  # fmt: skip
        kernels += ["the logits themselves"] if self.output_differs_on else []
        if judges_whole and self.whole_differs_on and not kernels:
            yield (
                f"with optimizations on, logits of {self.whole_differs_on} of {self.layer_images} images differ, "
                "although every kernel by itself is right: the runtime rewrites the graph across layers"
            )
        yield from _some(
            "with optimizations on, kernels give wrong codes even when fed the right ones "
            "(quantizers.settle(student) moves scales off rounding ties)", kernels,
        )  # fmt: skip


def _some(what: str, items: list[str] | tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence that names the first few items, if there are any."""
    if items:
        more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
        yield f"{what}: {', '.join(items[:NAMED])}{more}"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
