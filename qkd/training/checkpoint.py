"""Checkpoints of a training: two files each, verified by their hashes, the last two kept, never unpickled.

``NAME.safetensors`` holds the tensors. ``NAME.json`` is written after it, makes it valid, and holds the SHA-256 of the
tensors, everything that is not a tensor, and a SHA-256 of itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qkd.files import (
    DamagedFileError,
    delete_file,
    make_folder,
    may_write,
    parse_safetensors,
    read_json,
    read_verified,
    refuse_pickle,
    remove_unfinished,
    write_json,
    write_safetensors,
)
from qkd.foreign.opening import read_regular

FORMAT = 1  # increase it when the meaning of the files changes
KEPT = 2  # if the last one is damaged, there must be a good one to go back to
_NAME = re.compile(r"step-(\d{9})\.(json|safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to resume.

    Args:
        tensors: Name -> tensor, on the CPU.
        state: Everything else, as JSON values.
    """

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


class CheckpointStore:
    """The checkpoints in one folder.

    Args:
        folder: Their folder; created at the first write.
        warn: Called with a message for each damaged checkpoint that is skipped.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self._warn = warn
        self._damaged: set[int] = set()

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then delete all but the last two.

        Args:
            step: A number that increases from checkpoint to checkpoint.
            checkpoint: What to write.

        Raises:
            OSError: If it cannot be written (disk full, ...); earlier checkpoints are untouched.
        """
        if not may_write():
            return
        make_folder(self.folder)
        tensors_sha256 = write_safetensors(self._file(step, "safetensors"), checkpoint.tensors)
        body = {"format": FORMAT, "step": step, "tensors_sha256": tensors_sha256, "state": dict(checkpoint.state)}
        write_json(self._file(step, "json"), {**body, "sha256": _digest(body)})
        self._damaged.discard(step)
        self.prune(KEPT)

    def load(self) -> Checkpoint | None:
        """Return the last good checkpoint, or None if there is none.

        Raises:
            ValueError: If a pickled file is in a checkpoint's place, or the checkpoint has another format.
        """
        for step in reversed(self.steps()):
            try:
                return self._read(step)
            except (DamagedFileError, FileNotFoundError) as error:
                self._damaged.add(step)
                self._warn(f"checkpoint skipped: {error}")
        return None

    def prune(self, keep: int) -> None:
        """Delete all but the last ``keep`` (at least 1) good checkpoints, and the leftovers of interrupted writes."""
        good = [step for step in self.steps() if step not in self._damaged]
        kept = set(good[-keep:])
        for path in self._files():
            if _step_of(path) not in kept:
                delete_file(path)
        remove_unfinished([self.folder])

    def clear(self) -> None:
        """Delete every checkpoint, and the folder if nothing else is in it."""
        if not may_write():
            return
        with contextlib.suppress(FileNotFoundError):  # another process of the same training was faster
            for path in self._files():
                path.unlink(missing_ok=True)
            remove_unfinished([self.folder])
            with contextlib.suppress(OSError):  # other files in the folder are kept
                self.folder.rmdir()

    def steps(self) -> list[int]:
        """Return the steps of the completely written checkpoints, ascending."""
        return sorted(_step_of(path) for path in self._files() if path.suffix == ".json")

    def _files(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)] if self.folder.is_dir() else []

    def _file(self, step: int, suffix: str) -> Path:
        return self.folder / f"step-{step:09}.{suffix}"

    def _read(self, step: int) -> Checkpoint:
        file = self._file(step, "json")
        refuse_pickle(file, read_regular(file))
        body = read_json(file)
        if not isinstance(body, dict) or body.pop("sha256", None) != _digest(body):
            raise DamagedFileError(f"{file}: truncated or altered: its SHA-256 does not match")
        if body["format"] != FORMAT:
            raise ValueError(
                f"{file}: checkpoint format {body['format']}, this version reads {FORMAT}; "
                f"continue with the version that wrote it, or delete {self.folder} to train again"
            )
        path = self._file(step, "safetensors")
        return Checkpoint(parse_safetensors(path, read_verified(path, body["tensors_sha256"])), body["state"])


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("utf-8")).hexdigest()


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1
