"""Compare a student with its file: graphs and constants, then classes, logits and codes on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from export.codes import codes_in_order, device_of, recorded_outputs
from export.parity.expected import Expected, Outputs, expected_of, view_of
from export.parity.graphs import GraphParity, compare_graphs
from export.parity.layers import LayerTally
from export.parity.report import ParityReport
from export.parity.tally import Array, Tally
from export.parity.ways import Ways
from export.storage.preprocessing import Preprocessing
from quantizers.calibrate import as_batches
from quantizers.modes import evaluating

Batch = Tensor | Sequence[Tensor]
UNASKED = "constants were not compared with the student's, only behavior on these images (constants=False)"
TAPPED_CHUNK = 16  # images per pass while every layer's codes are kept; limits memory to a few hundred MB at 224x224


def check_parity(
    student: nn.Module,
    path: str | PathLike[str],
    batches: Tensor | Iterable[Batch],
    *,
    threads: int = 1,
    layer_images: int = 256,
    constants: bool = True,
    preprocessing: Preprocessing | None = None,
    provider: str | None = None,
    runtime: str | None = None,
) -> ParityReport:
    """Compare a student with its file: every constant, and classes, logits and codes on the same images.

    The student runs in evaluation mode, which is its deployed arithmetic, and is not changed. ONNX Runtime runs
    the file twice: optimizations off (float arithmetic between quantizers, as the file specifies) and on (the
    integer kernels a device uses). The codes of every quantizer are compared with optimizations off; then the kernels
    between two quantizers run by themselves on those codes, so that no difference comes from an earlier layer. A
    ``qonnx`` file is run by qonnx's own executor instead, node by node (slow), and ``on`` repeats ``off``.

    Images exercise only part of a file. So the student is also exported again, in memory, in the form of the file,
    and both graphs are compared: nodes, attributes, and constants, bit for bit. A file that names another program, or
    another version of this toolkit, as its writer may have another graph; then constants are not compared, and a note
    says so.

    An execution provider is compared with the CPU's, which shares none of its arithmetic: the whole file on every
    image and, on a few images, each layer in a graph that runs from the image to that layer, so that the provider's
    own regions compute it. Not a single bit may differ; ``report.provider`` says how many nodes it took.

    A file for another runtime (``export_onnx(..., target=...)``) can also be run there: its logits are compared with
    the student's on every image and, on a few images, the codes of each quantizer, in a graph that ends there;
    ``report.runtime`` holds the result.

    Args:
        student: What the file was exported from.
        path: A file that ``export_onnx`` wrote.
        batches: Batches of normalized float images ``[batch, channels, height, width]``, or of tuples ``(images,
            labels)``; labels ``[batch]`` also give accuracies. A tensor, or one pair, is one batch. Images that are
            all zeros prove nothing, so they are an error.
        threads: ONNX Runtime's threads, at least 1.
        layer_images: At most this many images are compared layer by layer; 0 skips layers.
        constants: Whether the file must be what ``export_onnx`` (or ``repack``) writes for the student. False judges a
            file that another program rewrote by its behavior on these images alone.
        preprocessing: How images become what the student was trained on; the file's metadata must say the same. Where
            it is inside the file, ``batches`` hold uint8 pixels ``[batch, channels, height, width]``: the student gets
            them normalized, the file gets them unchanged.
        provider: An execution provider to compare, such as ``LowBitExecutionProvider``; or None.
        runtime: Another runtime to compare: ``openvino``, ``opencv``, ``iree`` or ``tvm``; or None.

    Returns:
        What was compared and found: ``passed``, ``faults`` in words, accuracies as fractions 0..1, and codes layer by
        layer.

    Raises:
        ValueError: If there are no images, they are all zeros or have another shape or type than the file takes, a
            value is not finite, labels do not fit, the file is damaged or was not written by ``export_onnx``, the
            provider is not available, or the runtime is unknown.
        FileNotFoundError: If there is no file at ``path``.
        ImportError: If onnxruntime, the runtime, or qonnx (for a ``qonnx`` file) is missing.
        OSError: If the file cannot be read.
        TypeError: If the student's parameters are not float32, or a batch is not a tensor (or a tuple of tensors).
        quantizers.NotCalibratedError: If the student has not been calibrated.

    Example:
        >>> from export import export_onnx
        >>> from quantizers import QuantSpec, calibrate, prepare
        >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(16, 1, 8, 8)
        >>> student = prepare(net, QuantSpec(), images)
        >>> calibrate(student, images)
        >>> path = export_onnx(student.eval(), images, "student.onnx").path
        >>> report = check_parity(student, path, images.split(8))
        >>> report.passed, report.faults
        (True, ())
    """
    ways = Ways(path, threads, preprocessing)
    view = view_of(student)
    expected = expected_of(view)
    unmatched = dict(ways.match(expected))
    tally, layers = Tally(expected), LayerTally(ways.taps)
    compared = None if provider is None else ways.with_provider(provider)
    elsewhere = None if runtime is None else ways.in_runtime(runtime, expected)
    graphs = None if constants else GraphParity(note=UNASKED)
    with evaluating(student), torch.no_grad():
        for images, labels in _pairs(as_batches(batches), is_inside=ways.pixels is not None):
            ways.check_shape(images)
            graphs = graphs or compare_graphs(ways.model, view, images.shape[1:], preprocessing)
            for part, part_labels, tapped in _parts(images, labels, layer_images - layers.images):
                ours, off = _run_student(student, part, ways, expected, layers if tapped else None)
                on = off if ways.is_qonnx else ways.run(ways.on, part)
                tally.add(ours, off, on, part_labels, tapped=tapped)
                if compared is not None:
                    compared.add(ways.fed(part), on, keep=tapped)
                if elsewhere is not None:
                    elsewhere.add(ways.fed(part), ours, keep=tapped)
                tally.saw_values |= bool(part.any())
    report = tally.report(layers, unmatched, graphs or GraphParity(), ways, compared)
    return report if elsewhere is None else replace(report, runtime=elsewhere.report())


def _pairs(batches: Iterable[Batch], *, is_inside: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    for number, batch in enumerate(batches):
        images, labels = _split(batch, number)
        if is_inside and (images.dtype != torch.uint8 or images.dim() != 4):
            raise ValueError(
                f"batch {number}: the file normalizes by itself, so images must be uint8 [batch, channels, height, "
                f"width], found {images.dtype} {list(images.shape)}"
            )
        if not is_inside and (not images.is_floating_point() or images.dim() < 2):
            raise ValueError(f"batch {number}: images must be normalized floats, found {images.dtype}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"batch {number}: {list(labels.shape)} labels for {list(images.shape)} images")
        if not torch.isfinite(images).all():
            raise ValueError(f"batch {number}: an image holds a value that is not finite")
        pixels = images if is_inside else images.float()
        yield pixels.cpu().contiguous(), None if labels is None else labels.cpu()


def _split(batch: Any, number: int) -> tuple[Tensor, Tensor | None]:
    """Return the images of a batch, and its labels if it has any: what ``calibrate`` takes."""
    parts = batch if isinstance(batch, (tuple, list)) else (batch,)
    images, labels = parts[0] if parts else None, parts[1] if len(parts) > 1 else None
    if not isinstance(images, Tensor) or not isinstance(labels, (Tensor, type(None))):
        found = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise TypeError(
            f"batch {number}: must be an image tensor, or a tuple of images and labels, both tensors, found {found}; "
            "make tensors of other arrays (torch.from_numpy)"
        )
    return images, labels


def _parts(images: Tensor, labels: Tensor | None, tapped: int) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
    """Split a batch into small parts whose layers are compared, until ``tapped`` images are reached, and the rest."""
    start, count = 0, len(images)
    while start < count:
        is_tapped = start < tapped
        end = min(start + TAPPED_CHUNK, tapped, count) if is_tapped else count
        yield images[start:end], None if labels is None else labels[start:end], is_tapped
        start = end


def _run_student(
    student: nn.Module, images: Tensor, ways: Ways, expected: Expected, layers: LayerTally | None
) -> tuple[list[Array], Outputs]:
    """Return the outputs of the student, and of the file with optimizations off; compare layers if requested."""
    normalized = images if ways.pixels is None else torch.from_numpy(ways.pixels.normalize(images.numpy()))
    inputs = normalized.to(device_of(student))
    if layers is None:
        return _arrays(student(inputs)), ways.run(ways.off, images)
    with recorded_outputs(student, [tap.name for tap in ways.expected]) as outputs:
        ours = _arrays(student(inputs))
    found = ways.run_tapped(images)
    if isinstance(found, str):
        layers.images += len(images)
        return ours, found
    codes = codes_in_order(outputs, [(tap.name, tap.scale) for tap in ways.expected])
    layers.add(codes, found.off, found.alone, len(images))
    layers.saw_output(found.outputs[0], found.output_alone, expected.allowed(found.outputs[0], optimized=False))
    return ours, cast(Outputs, found.outputs)


def _arrays(output: Any) -> list[Array]:
    """Return a net's outputs in the order in which its file gives them."""
    if isinstance(output, Mapping):
        return [array for value in output.values() for array in _arrays(value)]
    if isinstance(output, (tuple, list)):
        return [array for value in output for array in _arrays(value)]
    values = cast(Tensor, getattr(output, "value", output))
    return [np.asarray(values.detach().float().cpu().numpy())]
