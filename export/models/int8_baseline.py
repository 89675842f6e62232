"""Write ONNX Runtime's own static int8 version of a float file, to compare a student with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from export.checks import ExportError
from export.runtime import open_session, runtime
from export.scratch import scratch_folder
from export.storage.metadata import properties_of, strip_notes
from export.storage.needs import makers
from export.storage.packing import ir_version
from export.storage.preprocessing import KEYS, write_properties
from export.writing import checked_target, write_whole

CALIBRATION_BATCH = 8  # images per run; observers keep every tensor of a run in memory


def export_int8_baseline(
    float_path: str | PathLike[str],
    images: npt.ArrayLike,
    path: str | PathLike[str],
    *,
    reduce_range: bool = True,
) -> Path:
    """Quantize a float file with onnxruntime's ``quantize_static``.

    QDQ form, per-channel int8 weights, uint8 activations, ranges from the smallest and largest value (MinMax): what
    its documentation recommends for convolutional nets. Batch norm is folded first, as it also recommends. What the
    float file says about its images is copied to this one.

    Args:
        float_path: A float ONNX file with one float32 input.
        images: Calibration images, normalized, float32 ``[images, channels, height, width]``, an array or a tensor of
            the CPU; use training images, otherwise the accuracy is flattered.
        path: Where the file goes; its folder must exist. Written whole or not at all.
        reduce_range: Whether weights are limited to 7 bits, which the documentation advises for x86 without VNNI
            (``quantizers.integer.PAIR_SUM_LIMIT``). It costs no time, and a file may run on any processor.

    Returns:
        The path.

    Raises:
        ExportError: If onnxruntime refuses the file, the images do not fit, or the path cannot be written to.
        FileNotFoundError: If there is no float file.
        ImportError: If onnxruntime is missing.
        OSError: If the temporary folder has no room.
        ValueError: If the float file is damaged.

    References:
        ONNX Runtime documentation, `Quantize ONNX Models
        <https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html>`_, "Static quantization".
    """
    target, source, images = checked_target(path), Path(float_path), np.asarray(images)
    (entry,) = _inputs(source)
    if not len(images) or list(images.shape[1:]) != list(entry.shape[1:]):
        raise ExportError(f"{source}: it takes {entry.shape}, but the calibration images are {list(images.shape)}")
    fixed = entry.shape[0]
    size = fixed if isinstance(fixed, int) else CALIBRATION_BATCH
    usable = len(images) - len(images) % size if isinstance(fixed, int) else len(images)
    parts = [{entry.name: images[at : at + size].astype(np.float32)} for at in range(0, usable, size)]
    if not parts:
        raise ExportError(f"{source}: its batch is fixed at {size}, but there are only {len(images)} images")
    with scratch_folder("qkd-int8-", room=source.stat().st_size) as place, _quiet():
        try:
            _quantize(source, parts, place, reduce_range=reduce_range)
        except Exception as error:  # onnxruntime's tools raise whatever their passes raise
            raise ExportError(f"{source}: onnxruntime cannot quantize it ({error})") from error
        model = onnx.load(place / "int8.onnx")
    strip_notes(model)
    _plain_header(model)
    said = {key: value for key, value in properties_of(onnx.load(source)).items() if key in KEYS}
    write_properties(model, {**said, **makers(model)})
    content = model.SerializeToString()
    write_whole(target, content)
    return target


def _quantize(
    source: Path, parts: list[dict[str, npt.NDArray[np.float32]]], place: Path, *, reduce_range: bool
) -> None:
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest: Iterator[Any] = iter(parts)

        def get_next(self) -> Any:
            return next(self.rest, None)

    # symbolic shape inference is for transformers, and needs sympy
    quant_pre_process(str(source), str(place / "prepared.onnx"), skip_symbolic_shape=True)
    quantization.quantize_static(
        str(place / "prepared.onnx"),
        str(place / "int8.onnx"),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        reduce_range=reduce_range,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=quantization.CalibrationMethod.MinMax,
    )


def _plain_header(model: onnx.ModelProto) -> None:
    """Drop the operator sets that no node uses (the tools list all they know), which shut out old runtimes."""
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.ir_version = ir_version(next(entry.version for entry in kept if entry.domain == ""))


def _inputs(source: Path) -> list[Any]:
    runtime()
    inputs = list(open_session(source, optimize=False).get_inputs())
    if len(inputs) != 1:
        raise ExportError(f"{source}: expected one input, found {', '.join(entry.name for entry in inputs)}")
    return inputs


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the tools' advice about steps that are already taken here."""
    root = logging.getLogger()
    level = root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)
