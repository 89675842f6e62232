"""Float weights to and from files: safetensors, or a plain ``torch.save`` of tensors; nothing is unpickled."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qkd.files import read_safetensors, write_safetensors
from quantizers import is_grid_record, require_same_grids

_LISTED = 8  # keys of each kind that an error spells out
_TORCH_SUFFIXES = (".pth", ".pt")
_WRAPPERS = ("state_dict", "model")  # under which training programs keep the tensors of a checkpoint


class WeightsError(ValueError):
    """A weights file that is missing, refused, damaged, or made for another net."""


def save_weights(net: nn.Module, path: Path) -> str:
    """Write the parameters and buffers of a net as safetensors, whole or not at all.

    Returns:
        The SHA-256 of the file, hexadecimal.

    Raises:
        OSError: If the disk refuses.
    """
    return write_safetensors(Path(path), net.state_dict())


def load_weights(net: nn.Module, path: Path) -> None:
    """Copy the weights of a file into a net, all of them or none.

    Args:
        net: Receives the weights; its keys, shapes and those of the file must be the same. (A missing
            ``num_batches_tracked``, which old files lack and nothing here reads, is forgiven.)
        path: ``*.safetensors``, or ``*.pth`` / ``*.pt`` that holds only tensors (a state dict, also under
            ``state_dict`` or ``model``); read with ``weights_only=True``.

    Raises:
        WeightsError: If the file is missing, of another kind, pickled, damaged, holds NaN or infinities, or does not
            fit: then with the missing, unexpected and ill-shaped keys, and the number of classes where only the head
                differs.
    """
    path = Path(path)
    found = _read(path)
    wanted = net.state_dict()
    faults = _mismatches(wanted, found)
    if faults:
        raise WeightsError(
            f"{path}: these weights are not for this net ({type(net).__name__}):\n  " + "\n  ".join(faults)
        )
    bad = [key for key, value in found.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if bad:
        raise WeightsError(f"{path}: holds NaN or infinite values in {_listed(bad)}; such weights cannot be trained on")
    try:
        require_same_grids(net, found)
    except RuntimeError as error:
        raise WeightsError(f"{path}: {error}") from error
    net.load_state_dict({key: found.get(key, value) for key, value in wanted.items()}, strict=True)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix in _TORCH_SUFFIXES:
        return _read_torch(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path}: is no weights file this can read; needs *.safetensors, or *.pth with tensors only")
    try:
        return read_safetensors(path)
    except ValueError as error:
        raise WeightsError(str(error)) from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on the pickle's protocol; what matters is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds pickled objects, which can run code when opened, and is refused; save the tensors alone: "
            "torch.save(net.state_dict(), path), or safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: damaged, or no file of torch.save ({_first_line(error)})") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"{path}: needs a mapping of names to tensors (a state dict), found {type(content).__name__}"
        )
    return {str(key): value for key, value in content.items()}


def _mismatches(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [key for key in wanted if key not in found and not _is_forgiven(key)]
    unexpected = sorted(key for key in found if key not in wanted)
    shapes = [key for key in wanted if key in found and wanted[key].shape != found[key].shape]
    head = _head_classes(wanted, found, shapes)
    faults = []
    if head is not None and not missing and not unexpected:
        theirs, ours, name = head
        faults.append(f"the head `{name}` of the file has {theirs} classes, this net has {ours}")
    if missing:
        faults.append(f"missing in the file ({len(missing)}): {_listed(missing)}")
    if unexpected:
        faults.append(f"unexpected in the file ({len(unexpected)}): {_listed(unexpected)}")
    if shapes:
        rows = [f"{key} {list(found[key].shape)} instead of {list(wanted[key].shape)}" for key in shapes]
        faults.append(f"of another shape ({len(shapes)}): {_listed(rows)}")
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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
