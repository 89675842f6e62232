"""Write a float model as an ONNX file, to compare a student with."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from os import PathLike
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from export.checks import ExportError
from export.codes import device_of
from export.lowering.model import INPUT, OUTPUT
from export.models.census import count_operators, optimized_graph
from export.models.student import ExportedModel
from export.storage.metadata import strip_notes
from export.storage.needs import makers, needs_text
from export.storage.packing import ir_version
from export.storage.preprocessing import Preprocessing, write_properties
from export.writing import checked_target, write_whole
from quantizers.modes import evaluating

FLOAT = onnx.TensorProto.FLOAT
FLOAT_OPSET = 18  # what torch's exporter writes without converting versions


def export_float(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | PathLike[str],
    *,
    opset: int = FLOAT_OPSET,
    preprocessing: Preprocessing | None = None,
) -> ExportedModel:
    """Write a float model with PyTorch's current exporter: input ``images`` with a dynamic batch, output ``logits``.

    Batch norm is left to ONNX Runtime, which folds it into the convolutions when it loads the file.

    Args:
        model: Any float model; it is exported in evaluation mode and not changed.
        example_inputs: One batch of images ``[batch, channels, height, width]``.
        path: Where the file goes; its folder must exist. Written whole or not at all.
        opset: Version of the operator set; 18 is what PyTorch's exporter writes without a conversion.
        preprocessing: How images become what the net was trained on, for the file's metadata; outside the file.

    Returns:
        What was written; ``flavor`` is ``float``, and there are no layers.

    Raises:
        ExportError: If PyTorch's exporter or ONNX Runtime refuses the model, preprocessing is to be inside the file or
            does not fit the images, or the path cannot be written to.
        ImportError: If onnxscript, which PyTorch's exporter needs, is missing.
        OSError: If the temporary folder has no room.
    """
    target = checked_target(path)
    if importlib.util.find_spec("onnxscript") is None:
        raise ImportError("PyTorch's ONNX exporter needs onnxscript: pip install onnxscript")
    images = example_inputs if isinstance(example_inputs, Tensor) else example_inputs[0]
    if preprocessing is not None:
        if preprocessing.is_inside:
            raise ExportError("preprocessing inside the file is for students; a float net's stays outside")
        preprocessing.check_fits(images.shape)
    # two images: an example batch of one would become a constant
    images = images[:1].expand(2, *images.shape[1:]).to(device_of(model)).contiguous()
    with evaluating(model), torch.no_grad(), _quiet():
        proto = _trace(model, images, opset)
    write_properties(proto, {**(preprocessing.properties() if preprocessing else {}), **makers(proto)})
    content = proto.SerializeToString()
    write_whole(target, content)
    operators, notes = _operators(proto, content, images)
    sizes = [(prod(entry.dims), len(entry.dims)) for entry in proto.graph.initializer if entry.data_type == FLOAT]
    return ExportedModel(
        path=target,
        size_bytes=len(content),
        opset=opset,
        flavor="float",
        packed=False,
        packed_weight_bytes=4 * sum(count for count, axes in sizes if axes > 1),  # the others are biases and norms
        theoretical_bytes=4 * sum(count for count, _ in sizes),
        layers=(),
        fall_backs=(),
        warnings=notes,
        operators=operators,
        operators_in_file=count_operators(proto),
        needs=needs_text(proto),
    )


def _trace(model: nn.Module, images: Tensor, opset: int) -> onnx.ModelProto:
    try:
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"},),
            external_data=False,
            verbose=False,
        )
    except Exception as error:  # it raises whatever its many passes raise
        raise ExportError(f"PyTorch's ONNX exporter refuses {type(model).__name__}: {error}") from error
    if program is None:
        raise ExportError("PyTorch's ONNX exporter returned nothing")
    proto: onnx.ModelProto = program.model_proto
    found = next(entry.version for entry in proto.opset_import if entry.domain == "")
    if found != opset:
        raise ExportError(f"PyTorch's ONNX exporter wrote opset {found}, not {opset}; use {found}")
    strip_notes(proto)
    proto.ir_version = ir_version(opset)  # the exporter's newest one shuts out runtimes that know every operator
    return proto


def _operators(proto: onnx.ModelProto, content: bytes, images: Tensor) -> tuple[dict[str, int], tuple[str, ...]]:
    try:
        return count_operators(optimized_graph(content, [tuple(images.shape)])), ()
    except ImportError:
        return count_operators(proto), ("not loaded: onnxruntime is missing",)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's chatter (deprecations of its parts, progress) away from the user."""
    loggers: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
