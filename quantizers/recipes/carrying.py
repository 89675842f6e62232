"""Carries weights and batch norm of one student over to another of the same net in other widths, with fresh scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantizers.student import act_quantizers, quant_layers, with_masks


@torch.no_grad()
def carry_over(student: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a student the latent weights and the batch norm of another of the same net, in place.

    Grids are not carried over: step sizes of weights are reinitialized from the new weights, and
    :func:`quantizers.calibrate` must set those of activations.

    Args:
        student: A network from :func:`quantizers.prepare`, not calibrated yet.
        state: ``state_dict()`` of a student of the same net and images, in any widths.

    Raises:
        ValueError: If a weight or a batch norm of the student is not in the state, or has another shape; the student is
            not changed then.
    """
    state = with_masks(student, state)
    own = {name: tensor for name, tensor in student.state_dict().items() if not _is_of_a_grid(name, student)}
    faults = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if faults:
        raise ValueError(
            f"the state is from another net: {len(faults)} of {len(own)} tensors are missing or have another shape "
            f"({', '.join(faults[:3])}); give the state of a student of the same net"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])
    for layer in quant_layers(student).values():
        layer.quant.restart(layer.turned(layer.weight))


def _is_of_a_grid(name: str, student: nn.Module) -> bool:
    quantizers = [f"{path}.weight_quant." for path in quant_layers(student)]
    quantizers += [f"{path}." for path in act_quantizers(student)]
    return any(name.startswith(prefix) for prefix in quantizers)
