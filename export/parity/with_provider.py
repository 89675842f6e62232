"""Compare a file under an execution provider with the same file without it, bit for bit, whole and layer by layer.

A provider computes regions of a graph, and a tensor inside one cannot be inspected: as an output, it would end the
region. So each layer is compared in a separate graph, which runs from the image to that layer: everything before it
runs in the provider's own regions and is fed only what the whole file would feed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from export.lowbit.sessions import made_known
from export.lowering.model import INPUT
from export.parity.layers import attempted
from export.runtime import claimed_nodes, open_session

LAYER_IMAGES = 16  # one graph per layer, half the net on average: more would take as long as all other comparisons
LAYERS = ("Conv", "Gemm", "MatMul", "MatMulNBits", "ConvTranspose")
Outputs = list[npt.NDArray[Any]] | str


@dataclass(frozen=True)
class ProviderLayer:
    """The values of one quantizer, with the provider and without.

    Args:
        name: The quantizer's module path.
        values: Values compared.
        differing: Those that are not bit-identical.
        is_claimed: Whether the provider computed it where it was compared; None if onnxruntime does not say.
        fault: Why it could not be compared; empty if it was.
    """

    name: str
    values: int
    differing: int
    is_claimed: bool | None
    fault: str = ""


@dataclass(frozen=True)
class ProviderParity:
    """A file under an execution provider against the same file under the CPU's, optimizations on.

    Args:
        provider: Its name.
        images: Images whose outputs were compared.
        differing: Images with an output that is not bit-identical.
        claimed: Nodes of the file that the provider took; None if onnxruntime does not say (before 1.24).
        nodes: Nodes of the file.
        claimed_layers: Convolutions and linear layers that it took; likewise.
        layer_count: Convolutions and linear layers of the file.
        layers: One row per quantizer, on the first ``layer_images`` images.
        layer_images: Images that layers were compared on.
        shown: Nodes among ``claimed`` that the provider also computed in the graph of a layer.
        fault: Why outputs could not be compared; empty if they were.
    """

    provider: str
    images: int
    differing: int
    claimed: int | None
    nodes: int
    claimed_layers: int | None
    layer_count: int
    layers: tuple[ProviderLayer, ...] = ()
    layer_images: int = 0
    shown: int = 0
    fault: str = ""

    @property
    def faults(self) -> tuple[str, ...]:
        """Why the provider is not shown to compute this file as the CPU does; empty if it is.

        A provider that took no node computes nothing: equal outputs would prove nothing about it.
        """
        found = [self.fault] if self.fault else []
        if self.claimed == 0:
            found.append("it takes no nodes of this file, so equal outputs prove nothing about it")
        if self.differing:
            found.append(f"outputs of {self.differing} of {self.images} images differ from those without it")
        wrong = [layer for layer in self.layers if layer.differing or layer.fault]
        if wrong:
            first = wrong[0]
            what = first.fault or f"{first.differing} of {first.values} values"
            found.append(f"{len(wrong)} of {len(self.layers)} layers differ; the first is {first.name} ({what})")
        return tuple(f"{self.provider}: {text}" for text in found)

    @property
    def sentence(self) -> str:
        """The comparison in one sentence."""
        rows = [layer for layer in self.layers if layer.is_claimed]
        taken = "an unknown number" if self.claimed is None else str(self.claimed)
        layers = "" if self.claimed_layers is None else f", {self.claimed_layers} of {self.layer_count} layers"
        verdict = "FAILED" if self.faults else "identical"
        return (
            f"{self.provider} computes {taken} of {self.nodes} nodes{layers}: outputs of {self.images} images and "
            f"{sum(layer.values for layer in rows):,} codes of {len(rows)} quantizers ({self.shown} nodes) {verdict}"
        )


class ProviderTally:
    """Sums over images of a file's outputs with and without a provider.

    Args:
        model: The file.
        path: Its path.
        provider: Name of the execution provider.
        taps: Its quantizers: ``name`` and ``tensor``.
        outputs: Names of the outputs that are compared.
        threads: ONNX Runtime's threads.

    Raises:
        ValueError: If the provider is not offered here.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        path: Any,
        provider: str,
        taps: Sequence[Mapping[str, Any]],
        outputs: Sequence[str],
        threads: int,
    ) -> None:
        self.model, self.provider, self.taps, self.threads = model, made_known(provider), taps, threads
        self.outputs = list(outputs)
        self.session = self._open(path)
        self.claimed = claimed_nodes(self.session, provider)
        self.images = self.differing = 0
        self.fault = ""
        self.kept: list[npt.NDArray[Any]] = []
        self.shown: set[str] = set()

    def add(self, images: npt.NDArray[Any], plain: Outputs, *, keep: bool) -> None:
        """Add a batch.

        Args:
            images: As the file takes them, ``[batch, channels, height, width]``.
            plain: Outputs of the file without the provider, optimizations on; or why there are none.
            keep: Whether layers may be compared on these images.
        """
        self.images += len(images)
        kept = sum(map(len, self.kept))
        if keep and kept < LAYER_IMAGES:
            self.kept.append(images[: LAYER_IMAGES - kept])
        ours = attempted(self.session.run, self.outputs, {INPUT: images})
        for found in (plain, ours):
            if isinstance(found, str):
                self.fault = self.fault or found
                self.differing += len(images)
                return
        same = np.ones(len(images), bool)
        for one, other in zip(map(np.asarray, ours), map(np.asarray, plain), strict=True):
            if one.shape != other.shape:
                same[:] = False
            else:
                same &= (_bits(one) == _bits(other)).reshape(len(images), -1).all(1)
        self.differing += int((~same).sum())

    def report(self) -> ProviderParity:
        """Compare the layers, and return all results."""
        images = np.concatenate(self.kept) if self.kept else None
        rows = (
            () if images is None or self.claimed == frozenset() else tuple(self._row(tap, images) for tap in self.taps)
        )
        nodes = {node.name: node for node in self.model.graph.node}
        layers = {name for name, node in nodes.items() if node.op_type in LAYERS}
        claimed = self.claimed
        return ProviderParity(
            provider=self.provider,
            images=self.images,
            differing=self.differing,
            claimed=None if claimed is None else len(claimed & nodes.keys()),
            nodes=len(self.model.graph.node),
            claimed_layers=None if claimed is None else len(claimed & layers),
            layer_count=len(layers),
            layers=rows,
            layer_images=len(images) if images is not None and rows else 0,
            shown=len(self.shown & (claimed or set()) & nodes.keys()),
            fault=self.fault,
        )

    def _open(self, model: Any) -> Any:
        return open_session(model, optimize=True, threads=self.threads, provider=self.provider, records_claims=True)

    def _row(self, tap: Mapping[str, Any], images: npt.NDArray[Any]) -> ProviderLayer:
        name, tensor = str(tap["name"]), str(tap["tensor"])
        part, maker = ending_at(self.model, tensor, str(tap.get("type", "UINT8")))
        ours = attempted(self._open, part)
        plain = attempted(lambda: open_session(part, optimize=True, threads=self.threads))
        values = [
            one if isinstance(one, str) else attempted(one.run, [tensor], {INPUT: images}) for one in (ours, plain)
        ]
        for value in values:
            if isinstance(value, str):
                return ProviderLayer(name, 0, 0, None, value)
        mine, theirs = (np.asarray(value[0]) for value in values)
        claimed = claimed_nodes(ours, self.provider)
        is_claimed = None if claimed is None else maker in claimed
        self.shown |= claimed or set()
        if mine.shape != theirs.shape:
            return ProviderLayer(name, 0, 0, is_claimed, f"shape {list(mine.shape)}, without it {list(theirs.shape)}")
        return ProviderLayer(name, theirs.size, int((_bits(mine) != _bits(theirs)).sum()), is_claimed)


def ending_at(model: onnx.ModelProto, tensor: str, kind: str) -> tuple[bytes, str]:
    """Return the part of a model that computes a tensor from the image, and the name of the node that gives its codes.

    Args:
        model: The whole model.
        tensor: Output of the part.
        kind: Its element type, as ``TensorProto`` names it.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    wanted, pending = set[str](), [tensor]
    while pending:
        node = makers.get(pending.pop())
        if node is not None and node.output[0] not in wanted:
            wanted.add(node.output[0])
            pending += [name for name in node.input if name]
    nodes = [node for node in model.graph.node if node.output[0] in wanted]
    used = {name for node in nodes for name in node.input}
    constants = [entry for entry in model.graph.initializer if entry.name in used]
    output = helper.make_tensor_value_info(tensor, TensorProto.DataType.Value(kind), None)
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.CopyFrom(helper.make_graph(nodes, "part", model.graph.input, [output], constants))
    maker = makers[tensor]
    while maker.op_type == "DequantizeLinear" and maker.input[0] in makers:  # codes are what a provider gives
        maker = makers[maker.input[0]]
    return bytes(part.SerializeToString()), maker.name


def _bits(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return floats as the integers with the same bits, so that a NaN equals itself, and 0 is not -0."""
    return values.view(np.int32) if values.dtype == np.float32 else values
