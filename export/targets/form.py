"""What a target decides about an export: flavor, storage, operator set, and what the student may hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import onnx

from export.checks import ExportError
from export.storage.blocked import WIDTHS, LinearForm
from export.storage.metadata import properties_of
from export.storage.needs import OPSETS, storage_for
from export.storage.packing import INT2, INT4, Pack
from export.storage.preprocessing import write_properties
from export.targets.rewrites import rewrite
from export.targets.table import Target, find_target
from export.versions import AMX_WIDTH, range_note
from quantizers.integer import Conv, Function, Grid, IntegerView, Linear, Node, Quantize, Shape

DEFAULT_FLAVOR = "ort"
MOST_AXES = 5  # of a padding that every runtime supports; a transposed convolution with strides in two axes pads six


@dataclass(frozen=True)
class Form:
    """How a file is written.

    Args:
        flavor: Flavor of the graph.
        pack: How low-bit weights are stored.
        linear: Form of linear layers.
        opset: Version of the operator set; None for the oldest that the storage allows.
        target: The runtime it is for; None if unspecified.
    """

    flavor: str
    pack: Pack
    linear: LinearForm
    opset: int | None
    target: Target | None = None


def form_of(target: str | None, flavor: str, pack: Pack, linear: LinearForm, opset: int | None) -> Form:
    """Return how a file is written for a target, or as requested if there is none.

    Args:
        target: As ``find_target`` takes it, or None.
        flavor: As in ``export_onnx``, like those below.
        pack: See there.
        linear: See there.
        opset: See there.

    Raises:
        ExportError: If the target is unknown or refused, or another argument contradicts it.
    """
    if target is None:
        return Form(flavor, pack, linear, opset)
    try:
        chosen = find_target(target)
    except ValueError as error:
        raise ExportError(str(error)) from None
    if flavor not in (DEFAULT_FLAVOR, chosen.flavor):
        raise ExportError(f"target {chosen.name!r} takes flavor {chosen.flavor!r}; leave flavor out, got {flavor!r}")
    if pack == "packed" and chosen.pack == "int8":
        raise ExportError(f"target {chosen.name!r} takes weights only as int8; use pack='auto' or 'int8'")
    if linear == "matmul_nbits" and chosen.linear == "gemm":
        raise ExportError(f"target {chosen.name!r} has no MatMulNBits; use linear='auto' or 'gemm'")
    if chosen.oldest is not None:
        return _at_version(chosen, pack, linear, opset)
    return Form(
        chosen.flavor,
        cast(Pack, chosen.pack) if pack == "auto" else pack,
        cast(LinearForm, chosen.linear) if linear == "auto" else linear,
        opset or chosen.opset,
        chosen,
    )


def _at_version(target: Target, pack: Pack, linear: LinearForm, opset: int | None) -> Form:
    """Return the most compact form that a version of ONNX Runtime loads; the installed version does not matter."""
    loads = storage_for(target.oldest or (0, 0))
    if pack == "packed" and INT4.name not in loads:
        raise ExportError(f"target {target.name!r} does not load packed weights; use pack='auto' or a newer version")
    if linear == "matmul_nbits" and not _loads_blocks(loads):
        raise ExportError(f"target {target.name!r} is slow at MatMulNBits; use linear='auto' or a newer version")
    if opset is not None and OPSETS.get(opset, (0, 0)) > (target.oldest or (0, 0)):
        raise ExportError(
            f"target {target.name!r} does not load opset {opset}; leave opset out, or use a newer version"
        )
    if pack == "auto":
        pack = "packed" if INT4.name in loads else "int8"
    if pack == "packed" and INT2.name not in loads:
        opset = opset or INT4.opset  # rules out INT2, which is newer
    return Form(target.flavor, pack, linear if _loads_blocks(loads) else "gemm", opset, target)


def _loads_blocks(loads: tuple[str, ...]) -> bool:
    return all(blocks.name in loads for blocks in WIDTHS)


def check_suits(view: IntegerView, target: Target | None) -> None:
    """Refuse a student that a target cannot compute, naming the place and a way out.

    Raises:
        ExportError: If a grid has a zero point that the target does not take, or the student holds a function that it
            lacks.
    """
    if target is None:
        return
    for node in view.nodes:
        if isinstance(node, Quantize) and any(limit.key == "symmetric" for limit in target.limits):
            _check_symmetric(node.name, node.grid, target)
        if found := _kinds(node, view) & target.lacks:
            raise ExportError(
                f"{node.name}: target {target.name!r} does not compute {min(found)} exactly; use another layer in the "
                "net, or another target (`qkd ls targets`)"
            )


def _kinds(node: Node, view: IntegerView) -> set[str]:
    """Return what a target may lack: a real function, padding with a code other than 0, or padding of many axes."""
    if isinstance(node, Function):
        return {f"{node.op}_tanh" if node.attributes.get("approximate") == "tanh" else node.op}
    if not isinstance(node, Shape) or node.op != "pad":
        return set()
    grid, axes = view.grids.get(node.output), len(cast(Sequence[int], node.attributes["before"]))
    kinds = {"signed_pad": grid is not None and bool(grid.low), f"pad_of_{axes}_axes": axes > MOST_AXES}
    return {kind for kind, is_there in kinds.items() if is_there}


def _check_symmetric(name: str, grid: Grid, target: Target) -> None:
    if grid.is_shifted:
        raise ExportError(
            f"{name}: its codes are {grid.low}..{grid.high}, but target {target.name!r} takes no zero points; train "
            "with symmetric grids (config: quant.symmetric: true; API: QuantSpec(symmetric=True))"
        )


def version_notes(view: IntegerView, target: Target | None) -> tuple[str, ...]:
    """Return what versions that a target allows compute wrongly for a student; empty if nothing is known."""
    if target is None or target.oldest is None:
        return ()
    layers = [node for node in view.nodes if isinstance(node, (Conv, Linear))]
    concerned = [layer.name for layer in layers if layer.weights.shape[0] % AMX_WIDTH]
    note = range_note(target.oldest, concerned)
    return (note,) if concerned and note else ()


def write_for(model: onnx.ModelProto, target: Target | None) -> None:
    """Rewrite a lowered model for its target, in place, and record the target in its metadata.

    Raises:
        ExportError: If a rewrite does not fit the graph.
    """
    if target is None:
        return
    try:
        rewrite(model, target.rewrites)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is invalid once rewritten for target {target.name!r} ({error})") from error
    said = {"target": target.name}
    if not target.is_onnxruntime:
        said["needs"] = json.dumps(needs_of(target))
    write_properties(model, said)


def needs_of(target: Target) -> str:
    """Return what runs a file of a target, in words."""
    return f"{target.name} (tried with {target.tried})"


def target_of(model: onnx.ModelProto) -> Target | None:
    """Return the target that a file says it was written for; None if it names none.

    Raises:
        ValueError: If it names one that this version does not know.
    """
    name = properties_of(model).get("target")
    return None if name is None else find_target(name)
