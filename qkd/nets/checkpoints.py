"""Weights files of other programs: detect their kind by content, unwrap state dicts, strip name prefixes."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkd.files import read_safetensors
from qkd.foreign.opening import open_regular

# Where training programs keep a state dict, most likely first; averages come after the values that they average.
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params")
AVERAGES = ("model_ema", "ema", "ema_state_dict", "state_dict_ema", "ema_model", "shadow")
INSERTED = ("_orig_mod", "module")  # parts that torch.compile and DataParallel insert into names where they wrap
BOOKKEEPING = ("n_averaged", "num_updates", "decay")  # stored with averaged weights, but not weights
_DEEPEST = 3  # nested wrappers
_KINDS = (
    (b"\x89HDF", "an HDF5 file"), (b"\x1f\x8b", "a gzip archive"), (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"BZh", "a bzip2 archive"), (b"\xfd7zXZ", "an xz archive"), (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"<", "a web page or XML"), (b"version https://git-lfs", "a Git LFS pointer: the file itself was not fetched"),
)  # fmt: skip


class UnreadableWeights(ValueError):
    """A file without readable weights; the message does not include the file name."""


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, as stored in a file or renamed.

    Args:
        tensors: Name -> tensor.
        place: Keys that lead to it in the file, joined by dots; empty if it is the whole file.
        change: How the names were changed, in words; empty if they were not.
    """

    tensors: Mapping[str, Tensor]
    place: str = ""
    change: str = ""

    @property
    def note(self) -> str:
        """How these weights were obtained, in words; empty if nothing was changed."""
        words = [f"taken from `{self.place}`"] if self.place else []
        return ", ".join([*words, self.change] if self.change else words)


def read_state_dicts(path: Path) -> list[StateDict]:
    """Return the state dicts in a file, most likely first; the format is detected by content, not by suffix.

    Args:
        path: A safetensors or ``torch.save`` file. The latter is read with ``weights_only=True``, which creates
            only tensors and plain containers.

    Raises:
        UnreadableWeights: If it is neither, is damaged, or holds objects of other classes or no state dict.
        OSError: If it cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(32)
        size = file.seek(0, 2)
    if _is_safetensors(start, size):
        try:
            return [StateDict(read_safetensors(path))]
        except ValueError as error:
            raise UnreadableWeights(str(error).removeprefix(f"{path}: ")) from error
    if start[:4] != b"PK\x03\x04" and start[:1] != b"\x80":
        raise UnreadableWeights(
            f"is not a readable weights file: {_kind(start)}; needs safetensors or torch.save format"
        )
    content = _read_torch(path)
    found = list(_state_dicts(content, ""))
    if not found:
        raise UnreadableWeights(
            f"needs a mapping of names to tensors (a state dict), alone or under {', '.join(WRAPPERS)}; found "
            f"{_describe(content)}"
        )
    return found


def renamed(state: StateDict, wanted: Mapping[str, Tensor]) -> Iterator[StateDict]:
    """Yield a state dict under the names that a net may use: unchanged, and without inserted parts and prefixes.

    Args:
        state: As in the file.
        wanted: The net's own state dict.
    """
    yield state
    kept = {name: tensor for name, tensor in state.tensors.items() if name not in BOOKKEEPING}
    bare = {_without_inserted(name): tensor for name, tensor in kept.items()}
    if len(bare) < len(kept):
        return  # two names would become the same
    parts = [part for part in INSERTED if any(part in name.split(".") for name in kept)]
    change = f"without {' and '.join(f'`{part}.`' for part in parts)} in the names" if parts else ""
    if parts or len(kept) < len(state.tensors):
        yield StateDict(bare, state.place, _joined(state.change, change))
    for names, words in ((kept, ""), (bare, change)):
        prefix = _prefix(names, wanted)
        if prefix:
            stripped = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
            yield StateDict(stripped, state.place, _joined(state.change, words, f"without the prefix `{prefix}`"))


def _joined(*words: str) -> str:
    return ", ".join(word for word in words if word)


def _prefix(names: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """Return the prefix that all names in a file have in front of the net's names; empty if there is none."""
    first = next(iter(wanted), None)
    if first is None:
        return ""
    for name in names:
        if name.endswith(f".{first}"):
            prefix = name.removesuffix(first)
            return prefix if all(other.startswith(prefix) for other in names) else ""
    return ""


def _without_inserted(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in INSERTED)


def _is_safetensors(start: bytes, size: int) -> bool:
    """Return whether a file begins like safetensors: with the length of a header, and the header's brace."""
    length = int.from_bytes(start[:8], "little")
    return size >= 10 and start[8:9] == b"{" and length <= size - 8


def _read_torch(path: Path) -> Any:
    try:
        # An open file, because PyTorch would choose the format by the suffix of a path.
        with open_regular(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol; real problems are refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnreadableWeights(_refusal(str(error))) from error
    except Exception as error:  # damaged or foreign archives can make the reader raise anything
        if "TorchScript" in str(error):
            raise UnreadableWeights(
                "is a TorchScript program, which is not run; save net.state_dict() alone"
            ) from error
        raise UnreadableWeights(f"damaged, or not a torch.save file ({_first_line(error)})") from error


def _refusal(reason: str) -> str:
    found = re.search(r"(?:GLOBAL|global:?|type:?|class) [`']?([\w.]+\.[\w.]+)", reason)
    what = f" (of {found.group(1)})" if found else ""
    return (
        f"holds pickled objects{what}, which can run code when opened, and is refused; if you trust the file, save "
        'only its tensors: python -c "import sys, torch; d = torch.load(sys.argv[1], weights_only=False); '
        "d = d.get('state_dict', d) if isinstance(d, dict) else d.state_dict(); torch.save(d, sys.argv[2])\" "
        "OLD.pth NEW.pth"
    )


def _state_dicts(content: Any, place: str, depth: int = 0) -> Iterator[StateDict]:
    """Yield the mappings of names to tensors in a file: the file itself, or values of known keys, most likely first."""
    if not isinstance(content, Mapping) or depth > _DEEPEST:
        return
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if tensors and all(key in BOOKKEEPING or content[key] is None for key in others):
        yield StateDict(tensors, place)
        return
    for key in (*WRAPPERS, *AVERAGES):
        if key in content:
            yield from _state_dicts(content[key], f"{place}.{key}" if place else key, depth + 1)
    if tensors and depth == 0:
        yield StateDict(tensors, place)  # tensors mixed with other things: better than nothing, and faults are listed


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    keys = [ascii(str(key)) for key in list(content)[:8]]
    return f"a mapping of {', '.join(keys)}{', ...' if len(content) > 8 else ''}" if keys else "an empty mapping"


def _kind(start: bytes) -> str:
    if not start:
        return "it is empty"
    return next((f"it looks like {words}" for mark, words in _KINDS if start.startswith(mark)), "its kind is unknown")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
