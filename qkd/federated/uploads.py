"""How a client sends its net: everything in float, or low-bit weights as packed codes with their scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qkd.federated.averaging import State
from qkd.federated.messages import MODEL, prefixed, state_of
from qkd.training.state import below, fill
from quantizers import Student, quant_layers

CODES = "codes/"


class FloatUpload:
    """The whole state, unchanged."""

    def encode(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a reply.

        Args:
            net: The client's, after its training.
        """
        return prefixed(MODEL, state_of(net))

    def decode(self, tensors: Mapping[str, Tensor]) -> State:
        """Return the state in the tensors of a reply."""
        return below(tensors, MODEL)

    def encode_calibrated(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a reply to a calibration.

        Args:
            net: The client's; calibration has set its scales. Weights change only together with their steps, by the
                same tiny factor, which leaves their codes (:func:`quantizers.settle`).
        """
        return self.encode(net)

    def decode_calibrated(self, tensors: Mapping[str, Tensor], sent: State) -> State:  # noqa: ARG002
        """Return the state in the tensors of a reply to a calibration.

        Args:
            tensors: Of the reply.
            sent: State that the server sent to be calibrated.
        """
        return self.decode(tensors)


class CodesUpload(FloatUpload):
    """Weights as codes: for each layer its codes, with as many bits as the grid needs, and its scales in float.

    The position of a shadow weight within its code's cell (up to half a step) and the amount of clipping are lost: the
    server averages dequantized weights. The rest of the state (biases, batch norm, scales) is sent in float. Since
    calibration trains no weight, a reply to it has none: the server keeps its own, unrounded.

    Args:
        student: Low-bit, of the clients' kind; the server's own, whose state is overwritten by :meth:`decode`.
    """

    def __init__(self, student: Student) -> None:
        self._student = student

    def encode(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a reply: packed codes in place of the weights.

        Args:
            net: The client's student, after its training.
        """
        tensors = super().encode(net)
        for name, layer in quant_layers(net).items():
            codes, quant = layer.integers()[0], layer.quant
            tensors.pop(f"{MODEL}{name}.weight")
            shifted = (codes.cpu() - quant.low_code).long().flatten()
            tensors[f"{CODES}{name}"] = pack(shifted, code_bits(quant.low_code, quant.high_code))
        return tensors

    def decode(self, tensors: Mapping[str, Tensor]) -> State:
        """Return the state in the tensors of a reply, with dequantized weights in place of the shadow weights.

        Raises:
            ValueError: If the tensors are not of this student.
        """
        rest, layers = below(tensors, MODEL), quant_layers(self._student)
        own = self._student.state_dict()
        weights = {f"{name}.weight": own[f"{name}.weight"] for name in layers}
        fill(self._student, {**weights, **rest})
        for name, layer in layers.items():
            quant, weight = layer.quant, own[f"{name}.weight"]
            codes = unpack(
                tensors[f"{CODES}{name}"], code_bits(quant.low_code, quant.high_code), weight.numel()
            ) + quant.low_code  # fmt: skip
            weights[f"{name}.weight"] = layer.weight_of_codes(codes.reshape(weight.shape).to(weight.device)).cpu()
        return {name: rest[name] if name in rest else weights[name] for name in own}

    def encode_calibrated(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the tensors of a reply to a calibration: all but the low-bit layers' weights."""
        weights = {f"{MODEL}{name}.weight" for name in quant_layers(net)}
        return {name: tensor for name, tensor in super().encode(net).items() if name not in weights}

    def decode_calibrated(self, tensors: Mapping[str, Tensor], sent: State) -> State:
        """Return the state in the tensors of a reply to a calibration, with the weights that the server sent.

        Raises:
            ValueError: If the tensors are not of this student.
        """
        rest, layers = below(tensors, MODEL), quant_layers(self._student)
        weights = {f"{name}.weight": sent[f"{name}.weight"] for name in layers}
        fill(self._student, sent)
        before = {name: layer.quant.step.detach().clone() for name, layer in layers.items()}
        fill(self._student, {**weights, **rest})
        for name, layer in layers.items():  # settling rescales weights with their steps
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * (layer.quant.step.detach() / before[name]).cpu()
        return {name: rest[name] if name in rest else weights[name] for name in sent}


def code_bits(low: int, high: int) -> int:
    """Return the bits that a code between two ends, both included, takes."""
    return max(1, (high - low).bit_length())


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes as bytes, ``bits`` bits each, the least significant bit first.

    Args:
        codes: Whole numbers, 0 to ``2**bits - 1``, int64, shape ``[n]``.
        bits: Of a code, 1 to 8.

    Returns:
        uint8, ``ceil(n * bits / 8)`` bytes.
    """
    places = (codes[:, None] >> torch.arange(bits)) & 1
    flat = places.flatten()
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).reshape(-1, 8)
    return (padded << torch.arange(8)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of :func:`pack`.

    Args:
        packed: Its result.
        bits: Of a code.
        count: Number of codes.

    Raises:
        ValueError: If the number of bytes does not match.
    """
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise ValueError(f"{count} codes of {bits} bits take {-(-count * bits // 8)} bytes, got {tuple(packed.shape)}")
    flat = ((packed.long()[:, None] >> torch.arange(8)) & 1).flatten()[: count * bits]
    return (flat.reshape(count, bits) << torch.arange(bits)).sum(1)
