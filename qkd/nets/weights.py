"""Save and load float weights: safetensors, or ``torch.save`` files of plain tensors; no objects are unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qkd.files import write_safetensors
from qkd.foreign.opening import UnreadableFileError
from qkd.nets.checkpoints import StateDict, UnreadableWeights, read_state_dicts, renamed
from qkd.nets.head import KEEP, HeadError, without_head
from quantizers import is_grid_record, require_same_grids

AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # in torchvision's GoogLeNet and Inception
_LISTED = 8  # keys of each kind that an error spells out


class WeightsError(ValueError):
    """A weights file that is missing, refused, damaged, or made for another net."""


def save_weights(net: nn.Module, path: Path) -> str:
    """Write the parameters and buffers of a net as safetensors, atomically.

    Args:
        net: On any device; not changed.
        path: Where to; an existing file is replaced.

    Returns:
        The SHA-256 of the file, hexadecimal.

    Raises:
        OSError: If the disk refuses.
        ValueError: If the name is a device's, a pipe's or a socket's, or links to one.
    """
    return write_safetensors(Path(path), net.state_dict())


def load_weights(net: nn.Module, path: Path, *, head: str = KEEP) -> str:
    """Copy the weights of a file into a net, all of them or none.

    Args:
        net: Receives the weights; its keys and shapes must match those of the file. (A missing
            ``num_batches_tracked``, which old files lack and nothing here reads, is tolerated.)
        path: safetensors, or a ``torch.save`` file of tensors and plain values only, with any suffix; read
            with ``weights_only=True``. The state dict may be inside the wrappers of training programs (``state_dict``,
            ``model``, ``ema``, ...), and its names may have prefixes (``module.``, ``_orig_mod.``, ``model.``, ...) if
            all of them match without the prefixes.
        head: ``new``: the net's last linear layer keeps its own random weights, whatever the file has there;
            ``new:<layer>`` names the layer.

    Returns:
        What was done to make the weights fit, in words; empty if nothing.

    Raises:
        WeightsError: If the file is missing, of another kind, pickled or damaged, contains NaN, infinities or anything
            but dense float tensors, or does not fit. In the last case, the message lists the missing, unexpected and
            mis-shaped keys, the names found, and the number of classes if only the head differs.
    """
    path = Path(path)
    wanted = net.state_dict()
    state, note = _fitting(net, path, wanted, head)
    found = state.tensors
    _refuse_foreign_kinds(path, wanted, found)
    bad = [key for key, value in found.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise WeightsError(f"{path}: holds NaN or infinite values in {_listed(bad)}; such weights cannot be trained on")
    try:
        require_same_grids(net, found)
    except RuntimeError as error:
        raise WeightsError(f"{path}: {error}") from error
    net.load_state_dict({key: found.get(key, value) for key, value in wanted.items()}, strict=True)
    return note


def _refuse_foreign_kinds(path: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise unless each tensor with a matching name and shape holds values that a float net can take."""
    kinds = {key: _foreign_kind(value, wanted[key]) for key, value in found.items() if key in wanted}
    bad = [f"{key} ({kind})" for key, kind in kinds.items() if kind]
    if bad:
        raise WeightsError(f"{path}: weights must be dense tensors of real float values, found {_listed(bad)}; "
                           "save the state dict of the float net")  # fmt: skip


def _foreign_kind(value: Tensor, wanted: Tensor) -> str:
    """Return why a tensor cannot be loaded into a net; empty if it can."""
    if value.is_meta:
        return "meta device, without values"
    if value.is_quantized or value.layout is not torch.strided:
        return "quantized" if value.is_quantized else "sparse"
    if value.is_complex() or (wanted.is_floating_point() and not value.is_floating_point()):
        return str(value.dtype).removeprefix("torch.")
    return ""


def _fitting(net: nn.Module, path: Path, wanted: Mapping[str, Tensor], head: str) -> tuple[StateDict, str]:
    """Return the first state dict of a file that fits a net, and a note about it."""
    states = [_without_auxiliary(state, wanted) for state in _read(path)]
    renamings = [form for state in states for form in renamed(state, wanted)]
    if head != KEEP:
        renamings = _with_new_heads(net, path, wanted, renamings, head)
    forms = [(form, _mismatches(wanted, form.tensors)) for form in renamings]
    fitting = [form for form, faults in forms if not faults]
    if fitting:
        others = list(dict.fromkeys(state.place for state in states if state.place != fitting[0].place))
        more = f"; also there: {', '.join(f'`{place}`' for place in others)}" if others else ""
        return fitting[0], f"{fitting[0].note}{more}" if fitting[0].note else ""
    best, faults = min(forms, key=lambda pair: _distance(wanted, pair[0].tensors))
    how = f" ({best.note})" if best.note else ""
    keys = list(best.tensors)
    raise WeightsError(
        f"{path}: these weights{how} are not for this net ({type(net).__name__}):\n  "
        + "\n  ".join([*faults, f"names in the file ({len(keys)}): {_listed(keys)}"])
    )


def _without_auxiliary(state: StateDict, wanted: Mapping[str, Tensor]) -> StateDict:
    """Return a state dict without auxiliary heads, which torchvision's trained weights have, but our nets do not."""
    extra = {name for name in state.tensors if name.startswith(AUXILIARY)} - set(wanted)
    if not extra or len(extra) == len(state.tensors):
        return state
    rest = {name: value for name, value in state.tensors.items() if name not in extra}
    return StateDict(rest, state.place, "without its auxiliary heads")


def _with_new_heads(
    net: nn.Module, path: Path, wanted: Mapping[str, Tensor], states: list[StateDict], head: str
) -> list[StateDict]:
    """Return state dicts with the net's own last layer in place of theirs.

    Raises:
        WeightsError: If that works for none of them; states the reason for the most likely one.
    """
    found, reasons = [], []
    for state in sorted(states, key=lambda state: _distance(wanted, state.tensors)):
        try:
            tensors, words = without_head(net, head, wanted, state.tensors)
        except HeadError as error:
            reasons.append(str(error))
            continue
        found.append(StateDict(tensors, state.place, f"{state.change}, {words}" if state.change else words))
    if not found:
        raise WeightsError(f"{path}: {reasons[0]}")
    return found


def _distance(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> int:
    """Return how many names are in only one of a net and a state dict, or have different shapes."""
    unlike = [key for key in wanted if key in found and wanted[key].shape != found[key].shape]
    return len(set(wanted) ^ set(found)) + len(unlike)


def _read(path: Path) -> list[StateDict]:
    try:
        return read_state_dicts(path)
    except UnreadableFileError as error:  # its message includes the path
        raise WeightsError(str(error)) from error
    except UnreadableWeights as error:
        raise WeightsError(f"{path}: {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(f"{path}: no such weights file") from error
    except IsADirectoryError as error:
        raise WeightsError(f"{path}: is a folder; name the weights file in it") from error


def _mismatches(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in wanted if key not in found and not _is_forgiven(key)]
    unexpected = sorted(key for key in found if key not in wanted)
    shapes = [key for key in wanted if key in found and wanted[key].shape != found[key].shape]
    head = _head_classes(wanted, found, shapes)
    faults = []
    if head is not None and not missing and not unexpected:
        theirs, ours, name = head
        faults.append(
            f"the head `{name}` of the file has {theirs} classes, but this net has {ours}; set `head: new` next to "
            f"`weights` to skip it and train a new one"
        )
    if missing:
        faults.append(f"missing in the file ({len(missing)}): {_listed(missing)}")
    if unexpected:
        faults.append(f"unexpected in the file ({len(unexpected)}): {_listed(unexpected)}")
    if shapes:
        rows = [f"{key} {list(found[key].shape)} instead of {list(wanted[key].shape)}" for key in shapes]
        faults.append(f"wrong shape ({len(shapes)}): {_listed(rows)}")
    return faults


def _is_forgiven(key: str) -> bool:
    return key.endswith("num_batches_tracked") or is_grid_record(key)  # which older files lack


def _head_classes(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], shapes: list[str]
) -> tuple[int, int, str] | None:
    """Return ``(file's classes, net's classes, layer)`` if only the output dimension of the last layer differs."""
    layers = {key.rpartition(".")[0] for key in shapes}
    last = next((key.rpartition(".")[0] for key in reversed(list(wanted)) if key.endswith(".weight")), None)
    if len(layers) != 1 or layers != {last}:
        return None
    weight = f"{last}.weight"
    if weight not in shapes or wanted[weight].shape[1:] != found[weight].shape[1:]:
        return None
    return int(found[weight].shape[0]), int(wanted[weight].shape[0]), str(last)


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
