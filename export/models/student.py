"""Write a student as an ONNX file, and report how a runtime executes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from export.checks import ExportError, check_view, saturation_warnings
from export.cost import cost_of_view
from export.flavors import find_flavor
from export.lowering.model import Lowered, lower
from export.lowering.pixels import check_pixels
from export.models.census import Census, count_operators, float_inputs, take_census
from export.moved import OldFields, takes_old_arguments
from export.storage.blocked import LinearForm, choose_blocks
from export.storage.needs import needs_text
from export.storage.packing import Blocks, Pack, Storage, runtime_loads
from export.storage.preprocessing import Preprocessing
from export.targets.form import Form, check_suits, form_of, needs_of, version_notes, write_for
from export.writing import checked_target, write_whole
from quantizers.integer import Conv, IntegerView, Linear
from quantizers.modes import training_flags_kept

if TYPE_CHECKING:
    from quantizers import Student


BLOCK_FLAVOR = "ort"  # MatMulNBits is an operator of ONNX Runtime


@dataclass(frozen=True)
class ExportedLayer:
    """A convolution or linear layer, as written in the file.

    Args:
        name: The layer's name.
        kind: ``conv`` or ``linear``.
        kernel: The operator that ONNX Runtime computes it with; empty if the file was not loaded.
        weight_bits: Bits of its weights.
        input_bits: Bits of its input.
        storage: Element type of the stored weights.
        weights: How many weights it has.
        weight_bytes: Their size in the file.
    """

    name: str
    kind: str
    kernel: str
    weight_bits: int
    input_bits: int
    storage: str
    weights: int
    weight_bytes: int


@dataclass(frozen=True)
class ExportedModel(OldFields):
    """An ONNX file, and what is known about it.

    Args:
        path: Its path.
        size_bytes: Its size.
        opset: Version of the operator set.
        flavor: ``ort``, ``qcdq`` or ``qonnx``; ``float`` for a float twin.
        packed: Whether any weights are stored in less than eight bits.
        packed_weight_bytes: Size of the weights in the file.
        theoretical_bytes: Weights at their bits, and four bytes for each bias and each weight scale; for a float twin,
            four bytes per parameter.
        layers: Convolutions and linear layers in order; empty for a float twin.
        fall_backs: A sentence for each layer or function that stays in float: its name, and why. They are among the
            warnings, too. For other runtimes (``qcdq``, ``qonnx``, or if none is installed), those that read values
            without a grid.
        warnings: What a user should know.
        operators: Operator -> count as ONNX Runtime runs it; as in the file if it was not loaded.
        operators_in_file: Operator -> count before optimization.
        needs: What runs it: ``onnxruntime >= 1.24``.
        target: The runtime that it was written for; empty if unspecified.
    """

    path: Path
    size_bytes: int
    opset: int
    flavor: str
    packed: bool
    packed_weight_bytes: int
    theoretical_bytes: int
    layers: tuple[ExportedLayer, ...]
    fall_backs: tuple[str, ...]
    warnings: tuple[str, ...]
    operators: dict[str, int]
    operators_in_file: dict[str, int]
    needs: str = ""
    target: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**asdict(self), "path": str(self.path)}


@takes_old_arguments
def export_onnx(
    student: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | PathLike[str],
    *,
    flavor: str = "ort",
    pack: Pack = "auto",
    linear: LinearForm = "auto",
    opset: int | None = None,
    strict: bool = False,
    preprocessing: Preprocessing | None = None,
    target: str | None = None,
) -> ExportedModel:
    """Write a calibrated student as an ONNX file.

    Input ``images``: float32 ``[batch, channels, height, width]``, normalized (or uint8 pixels, see ``preprocessing``),
    the batch dynamic, the rest as in ``example_inputs``; output ``logits``. The file appears whole or not at all, and
    the student is not changed.

    Args:
        student: What ``quantizers.prepare`` made, calibrated.
        example_inputs: One batch ``[batch, channels, height, width]`` (values do not matter), or one per model input.
        path: Where the file goes; its folder must exist. An existing file is replaced.
        flavor: ``ort``: QDQ form for ONNX Runtime, which finds an integer kernel for every layer. ``qcdq``: plain
            QuantizeLinear, Clip, DequantizeLinear for other runtimes. ``qonnx``: Quant nodes for FINN, the batch
            fixed at 1; ONNX Runtime cannot load it.
        pack: ``ort`` only: ``packed`` stores weights of up to 4 bits as INT4 and of 2 bits as INT2, ``int8`` in bytes,
            ``auto`` packs as far as the installed onnxruntime loads it. ``qcdq`` stores int8, ``qonnx`` float32.
        linear: ``ort`` only: ``gemm`` writes linear layers as Gemm, ``matmul_nbits`` those of up to 4 bits as
            MatMulNBits (half the time of int8 or less at batch 1, equal to the bit; ONNX Runtime only), ``auto`` does
            so for layers of a million weights and more where the installed onnxruntime is fast at it and ``pack`` is
            not ``int8``.
        opset: Version of the operator set; default: the oldest that the storage allows (``ort``: 17, 21 or 25; others
            13, or 14 with HardSwish).
        strict: Whether a layer that stays in float is an error rather than a warning.
        preprocessing: How images become what the net was trained on; written into the file's metadata, so that it can
            be used without the toolkit. With ``place="inside"`` (``ort`` and ``qcdq``) the input ``images`` is uint8,
            in the layout that it names, and the graph normalizes it; all 256 values of every channel are run, and must
            give the same floats and codes to the bit.
        target: The runtime that the file is for (``qkd ls targets``), which decides flavor, storage, operator set and
            the form of quantizers and biases: ``openvino``, ``iree``, ``onnxruntime>=1.17``, ... If None, as the other
            arguments say.

    Returns:
        What was written, with a warning for each layer that ONNX Runtime leaves in float (other flavors: that reads
        values without a grid).

    Raises:
        ExportError: If the student cannot become such a file (the message names the layer), the target does not take
            it, ``strict`` is set and a layer stayed in float, an argument is not one of the allowed ones, preprocessing
            does not fit the images or cannot be inside the file exactly, or the path cannot be written to.
        quantizers.NotCalibratedError: If the student has not been calibrated.
        OSError: If the temporary folder has no room.
        TypeError: If the student's parameters are not float32.
        ValueError: If a bias does not fit int32 or a scale is not finite (names the layer).

    Example:
        >>> from quantizers import QuantSpec, calibrate, prepare
        >>> net, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.rand(16, 1, 8, 8)
        >>> student = prepare(net, QuantSpec(last_bits=4), images)
        >>> calibrate(student, images)
        >>> exported = export_onnx(student.eval(), images, "student.onnx", pack="packed")
        >>> [(layer.name, layer.weight_bits, layer.weight_bytes) for layer in exported.layers]
        [('1', 4, 64)]
        >>> exported.fall_backs  # no layer stays in float
        ()

    Note:
        A view whose products may saturate on x86 without VNNI (``quantizers.integer.PAIR_SUM_LIMIT``) gets a warning; a
        student's do not.
    """
    from quantizers import integer_view
    from quantizers.student import require_image_shape

    place = checked_target(path)
    find_flavor(flavor)
    shapes = _shapes(example_inputs)
    if not isinstance(student, fx.GraphModule):
        raise ExportError(f"export_onnx takes what quantizers.prepare made, got {type(student).__name__}")
    try:
        require_image_shape(student, shapes[0])
    except ValueError as error:
        raise ExportError(f"example_inputs: {error}") from None
    with training_flags_kept(student), torch.no_grad():
        view = integer_view(cast("Student", student))
    return write_view(
        view, shapes, place, flavor=flavor, pack=pack, linear=linear, opset=opset, strict=strict,
        preprocessing=preprocessing, target=target,
    )  # fmt: skip


@takes_old_arguments
def write_view(
    view: IntegerView,
    input_shapes: Sequence[tuple[int, ...]],
    path: str | PathLike[str],
    *,
    flavor: str = "ort",
    pack: Pack = "auto",
    linear: LinearForm = "auto",
    opset: int | None = None,
    strict: bool = False,
    preprocessing: Preprocessing | None = None,
    target: str | None = None,
) -> ExportedModel:
    """Write an integer view as an ONNX file; ``export_onnx`` without the student.

    Args:
        view: What the student computes.
        input_shapes: A shape for each input of the view, batch first.
        path: As for ``export_onnx``, like the other arguments.
        flavor: See there.
        pack: See there.
        linear: See there.
        opset: See there.
        strict: See there.
        preprocessing: See there.
        target: See there.

    Returns:
        What was written, as ``export_onnx``.

    Raises:
        ExportError: As ``export_onnx``.
        OSError: If the temporary folder has no room.
        ValueError: If the shapes do not fit the view.
    """
    place = checked_target(path)
    if len(input_shapes) != len(view.inputs):
        raise ExportError(f"the model has {len(view.inputs)} inputs, but example_inputs holds {len(input_shapes)}")
    check_view(view)
    form = form_of(target, flavor, pack, linear, opset)
    check_suits(view, form.target)
    chosen = find_flavor(form.flavor)
    layers = [node for node in view.nodes if isinstance(node, (Conv, Linear))]
    storage = replace(chosen.storage(view, form.pack, form.opset), blocks=_blocks(view, form))
    lowered = lower(view, chosen, storage, input_shapes, preprocessing)
    write_for(lowered.model, form.target)
    if preprocessing is not None and preprocessing.is_inside:
        check_pixels(lowered.model, preprocessing)
    content = lowered.model.SerializeToString()
    census, warnings = _census(content, lowered, storage, input_shapes) if chosen.is_runnable else (None, [])
    judged = census if chosen.is_judged_by_kernels else None
    said = judged.fall_backs if judged else float_inputs(lowered.view, lowered.places, lowered.steps)
    fall_backs = tuple(said)
    if strict and fall_backs:
        raise ExportError("layers stay in float:\n  " + "\n  ".join(fall_backs))
    rows = tuple(_layer(layer, view, storage, census, lowered) for layer in layers)
    theoretical_bytes = cost_of_view(view, input_shapes).student.parameter_bytes
    notes = [*chosen.notes(lowered.view), *saturation_warnings(view), *version_notes(view, form.target)]
    write_whole(place, content)
    return ExportedModel(
        path=place,
        size_bytes=len(content),
        opset=storage.opset,
        flavor=chosen.name,
        packed=bool(storage.blocks) or any(storage.of(layer.weight_bits).bits < 8 for layer in layers),
        packed_weight_bytes=sum(row.weight_bytes for row in rows),
        theoretical_bytes=theoretical_bytes,
        layers=rows,
        fall_backs=fall_backs,
        warnings=(*fall_backs, *warnings, *notes),
        operators=dict(census.operators) if census else count_operators(lowered.model),
        operators_in_file=count_operators(lowered.model),
        needs=_needs(lowered, form),
        target="" if form.target is None else form.target.name,
    )


def _needs(lowered: Lowered, form: Form) -> str:
    target = form.target
    return needs_text(lowered.model) if target is None or target.is_onnxruntime else needs_of(target)


def _blocks(view: IntegerView, form: Form) -> Mapping[str, Blocks]:
    if form.flavor != BLOCK_FLAVOR and form.linear == "matmul_nbits":
        raise ExportError(f"linear='matmul_nbits' is ONNX Runtime's own: it needs flavor 'ort', got {form.flavor!r}")
    is_portable = form.linear == "auto" and (form.flavor != BLOCK_FLAVOR or form.pack == "int8")
    return choose_blocks(view, "gemm" if is_portable else form.linear)


def _shapes(example_inputs: Tensor | Sequence[Tensor]) -> list[tuple[int, ...]]:
    if not isinstance(example_inputs, (Tensor, tuple, list)):
        raise ExportError(
            f"example_inputs must be a normalized float batch [batch, channels, height, width], or a list of one such "
            f"batch per model input, got {type(example_inputs).__name__}"
        )
    inputs = [example_inputs] if isinstance(example_inputs, Tensor) else list(example_inputs)
    for number, tensor in enumerate(inputs):
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or not tensor.is_floating_point():
            found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ExportError(f"example input {number} must be a normalized float batch [batch, ...], got {found}")
    return [tuple(tensor.shape) for tensor in inputs]


def _census(
    content: bytes, lowered: Lowered, storage: Storage, input_shapes: Sequence[tuple[int, ...]]
) -> tuple[Census | None, list[str]]:
    """Load the model once; return its census (None if the runtime is unavailable) and warnings."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return None, ["not loaded: onnxruntime is missing, so nothing is known about its kernels"]
    try:
        census = take_census(content, lowered.view, lowered.places, input_shapes)
    except OSError:  # of the disk, not of the graph
        raise
    except Exception as error:  # onnxruntime's exceptions share no public base
        used = {storage.of(n.weight_bits) for n in lowered.view.nodes if isinstance(n, (Conv, Linear))}
        missing = sorted(kind.name for kind in used if not runtime_loads(kind))
        if missing:
            return None, [f"not loaded: the installed onnxruntime has no {', '.join(missing)}; another must run it"]
        raise ExportError(f"ONNX Runtime refuses the graph: {error}") from error
    return census, []


def _layer(
    layer: Conv | Linear, view: IntegerView, storage: Storage, census: Census | None, lowered: Lowered
) -> ExportedLayer:
    kind, blocks = storage.of(layer.weight_bits), storage.blocks.get(layer.name)
    size_bytes = -(-int(layer.weights.size) * kind.bits // 8)
    if blocks is not None:
        size_bytes = blocks.bytes_of((layer.weights.shape[0], layer.weights.shape[1]))
    place = next((name for name, node in lowered.places.items() if node.output == layer.output), layer.name)
    return ExportedLayer(
        name=layer.name,
        kind=type(layer).__name__.lower(),
        kernel=census.kernels.get(place, "") if census else "",
        weight_bits=layer.weight_bits,
        input_bits=view.grids[layer.inputs[0]].bits,
        storage=kind.name if blocks is None else blocks.name,
        weights=int(layer.weights.size),
        weight_bytes=size_bytes,
    )
