"""Records in every quantizer's state which grid it is for, and refuses the state of another grid by name.

Without the record, a state of 4-bit weights would load into a 2-bit student: names and shapes are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RECORD = "grid_record"  # the buffer's name; int32: safetensors holds it, NCCL sends it, no cast touches it
METHODS = ("lsq", "pact", "dorefa", "stats")  # records hold the index: append only
KINDS = ("unsigned", "signed", "shifted")
INSIDE = (".weight_quant.tensor_quant", ".act_quant.fused_activation_quant_proxy.tensor_quant")  # Brevitas' own levels
SPELLED_OUT = 3  # quantizers in one message


class Recorded(nn.Module):
    """A quantizer whose state says which grid it is for.

    A state from before there were records loads unless something in it contradicts.
    """

    grid_record: Tensor

    def record(self, values: Sequence[int]) -> None:
        """Set the record; called once, when the grid is known."""
        self.register_buffer(RECORD, torch.tensor(list(values), dtype=torch.int32))

    def describe(self, values: Sequence[int]) -> str:
        """Return a record in words."""
        raise NotImplementedError

    def stored_record(self, state: Mapping[str, Tensor], prefix: str) -> list[int] | None:
        """Return the record in a state, or what an older state implies of it; None if that is nothing."""
        stored = state.get(prefix + RECORD)
        return None if stored is None else [int(value) for value in stored.reshape(-1).tolist()]

    def fault(self, state: Mapping[str, Tensor], prefix: str) -> str | None:
        """Return in words why a state does not fit, or None if it does.

        Args:
            state: Name -> tensor of a whole module.
            prefix: What this quantizer's names start with.
        """
        stored, own = self.stored_record(state, prefix), self.grid_record.tolist()
        if stored is None or stored == own:
            return None
        place = prefix.removesuffix(".")
        for inside in INSIDE:
            place = place.removesuffix(inside)
        return f"{place or 'it'}: the state has {self.describe(stored)}, the student {self.describe(own)}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: Any, missing_keys: Any,
        unexpected_keys: Any, error_msgs: list[str],
    ) -> None:  # fmt: skip
        fault = self.fault(state_dict, prefix)
        if fault is not None:
            error_msgs.append(fault)
            return
        # torch passes down its own shallow copy of the caller's dictionary
        state_dict.setdefault(prefix + RECORD, self.grid_record)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def is_grid_record(name: str) -> bool:
    """Return whether a name in a state is that of a record, which older states lack.

    Args:
        name: Name of a tensor in a state dict.

    Returns:
        True for the name of a record.
    """
    return name.rpartition(".")[2] == RECORD


def require_same_grids(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise if a state is for other grids than the model's.

    Args:
        model: A student, or any module with one inside; others pass.
        state: Name -> tensor, with the names of ``model.state_dict()``.

    Raises:
        RuntimeError: If so (names the layers and both widths).
    """
    quantizers = [(name, module) for name, module in model.named_modules() if isinstance(module, Recorded)]
    found = [module.fault(state, f"{name}." if name else "") for name, module in quantizers]
    faults = [fault for fault in found if fault is not None]
    if not faults:
        return
    more = f"\n  and {len(faults) - SPELLED_OUT} more" if len(faults) > SPELLED_OUT else ""
    raise RuntimeError(
        f"this state is from a student with other grids; {len(faults)} of {len(quantizers)} quantizers differ:\n  "
        + "\n  ".join(faults[:SPELLED_OUT]) + more
        + "\nprepare the student with the QuantSpec that the state was trained with"
    )  # fmt: skip
